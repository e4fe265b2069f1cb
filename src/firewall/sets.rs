//! The list as sets: derives edits from differences. Pure.
//!
//! The kernel removes an address from a set when its timeout ends, and the list does so by its
//! own clock. Within a few seconds of an expiry, either may come first.

use super::ipset::SetEdit;
use super::list::{Entry, Members};
use crate::rule::interval::LONGEST_IN_SET;
use crate::rule::net::Net;
use std::time::Duration;

/// How many seconds a timeout in the kernel may differ from the list: ipset lists whole seconds,
/// and an edit takes time.
const TOLERANCE: u64 = 3;

/// The timeout of an address in seconds; 0 means permanent. An expiry beyond the longest timeout
/// is renewed when half of that timeout has passed.
pub fn timeout(expires: Option<u64>, now: u64) -> u32 {
    let Some(second) = expires else { return 0 };
    u32::try_from(second.saturating_sub(now).max(1)).unwrap_or(u32::MAX).min(LONGEST_IN_SET)
}

/// Whether the timeout of an entry agrees with its expiry.
fn is_right(actual: u32, expires: Option<u64>, now: u64) -> bool {
    let wanted = timeout(expires, now);
    match (actual, wanted) {
        (0, _) | (_, 0) => actual == wanted,
        (_, LONGEST_IN_SET) => (LONGEST_IN_SET / 2..=LONGEST_IN_SET).contains(&actual),
        _ => u64::from(actual.abs_diff(wanted)) <= TOLERANCE,
    }
}

/// The edit after which a set has this entry for an address, or none.
pub fn edit<'a>(name: &'a str, net: Net, entry: Option<Entry>, now: u64) -> SetEdit<'a> {
    match entry {
        Some(entry) => SetEdit::Add { name, net, timeout: timeout(entry.expires(), now) },
        None => SetEdit::Delete { name, net },
    }
}

/// Whether the number of entries is plausible: those that are due may be gone.
pub fn has_right_size(members: &Members, entries: Option<usize>, now: u64) -> bool {
    let Some(entries) = entries else { return true };
    let Some(missing) = members.len().checked_sub(entries) else { return false };
    let is_due = |entry: &&Entry| is_due(entry.expires(), now);
    missing == 0 || missing <= members.values().filter(is_due).count()
}

/// Whether the kernel may have removed the address, or is about to.
fn is_due(expires: Option<u64>, now: u64) -> bool {
    expires.is_some_and(|second| second <= now.saturating_add(TOLERANCE))
}

/// Whether a listing of a set shows the same addresses as an earlier one, which began at most `age`
/// before, except those that have expired since.
pub fn agree(
    earlier: &Option<Vec<(Net, u32)>>,
    later: &Option<Vec<(Net, u32)>>,
    age: Duration,
) -> bool {
    let (Some(earlier), Some(later)) = (earlier, later) else {
        return earlier.is_none() && later.is_none();
    };
    let mut later = later.iter().peekable();
    let mut is_held_or_over = |(net, left): &(Net, u32)| {
        // ipset shows less than a second as one.
        let is_over = *left > 0 && u64::from(*left) <= age.as_secs().saturating_add(1);
        later.next_if(|(held, _)| held == net).is_some() || is_over
    };
    earlier.iter().all(&mut is_held_or_over) && later.next().is_none()
}

/// How to make a set match the list.
pub struct SetPlan<'a> {
    /// Deletions first, because the set may be full.
    pub edits: Vec<SetEdit<'a>>,
    /// The addresses that are now in another set: they leave this one when the rule of that one is
    /// in the kernel.
    pub moved: Vec<Net>,
    /// How many addresses the set lacks; for others, only the timeout is corrected.
    pub missing: usize,
    /// How many addresses are not in the list.
    pub unknown: usize,
}

/// Plans the repair of a set. `actual` is its addresses with their timeouts, sorted.
pub fn plan<'a>(
    name: &'a str,
    members: &Members,
    actual: &[(Net, u32)],
    maxelem: usize,
    has_moved: impl Fn(&Net) -> bool,
    now: u64,
) -> SetPlan<'a> {
    let unless_due = |(net, left): &(Net, u32)| {
        let is_due = *left > 0 && u64::from(*left) <= TOLERANCE;
        (!is_due).then_some(*net)
    };
    let (mut deleted, mut additions, mut missing) = (Vec::new(), Vec::new(), 0_usize);
    let size = actual.len();
    let mut actual = actual.iter().peekable();
    for (net, entry) in members {
        while let Some(unknown) = actual.next_if(|(held, _)| held < net) {
            deleted.extend(unless_due(unknown));
        }
        let held = actual.next_if(|(held, _)| held == net);
        let expires = entry.expires();
        if !is_due(expires, now) && !held.is_some_and(|(_, left)| is_right(*left, expires, now)) {
            missing = missing.saturating_add(usize::from(held.is_none()));
            additions.push(edit(name, *net, Some(*entry), now));
        }
    }
    deleted.extend(actual.filter_map(unless_due));
    let unknown = deleted.len();
    // If there is no room for them meanwhile, those that have moved are deleted first.
    let has_room = missing == 0 || size.saturating_add(missing) <= maxelem;
    let moved = deleted.extract_if(.., |net| has_room && has_moved(net)).collect();
    let mut edits: Vec<_> = deleted.iter().map(|net| edit(name, *net, None, now)).collect();
    edits.append(&mut additions);
    SetPlan { edits, moved, missing, unknown }
}

#[cfg(test)]
mod tests {
    use super::super::list::List;
    use super::*;
    use crate::rule::Rule;

    const NOW: u64 = 2_000_000_000;

    /// `1.1.1.1` is permanent, `1.1.1.1 60` expires in 60 seconds.
    fn parse(text: &str) -> Vec<(Net, u64)> {
        let entry = |text: &str| {
            let (net, left) = text.trim().split_once(' ').unwrap_or((text.trim(), "0"));
            (Net::parse(net).unwrap(), left.parse().unwrap())
        };
        text.split(',').filter(|text| !text.is_empty()).map(entry).collect()
    }

    fn list(text: &str) -> List {
        let mut list = List::new(Some(9));
        list.insert(&rule("9.9.9.9"), None);
        list.remove(&rule("9.9.9.9"));
        for (net, left) in parse(text) {
            list.insert(&rule(&net.to_string()), (left > 0).then(|| NOW + left));
        }
        list
    }

    fn rule(net: &str) -> Rule {
        format!("/drop/input/any/{net}").parse().unwrap()
    }

    #[test]
    fn timeouts() {
        let longest = LONGEST_IN_SET;
        let table = [
            (None, 0),
            (Some(NOW + 60), 60),
            (Some(NOW), 1),
            (Some(NOW - 60), 1),
            (Some(NOW + u64::from(longest)), longest),
            (Some(NOW + u64::from(longest) + 1), longest),
            (Some(u64::MAX), longest),
        ];
        for (expires, seconds) in table {
            assert_eq!(timeout(expires, NOW), seconds, "{expires:?}");
        }
    }

    #[test]
    fn repairs() {
        // The list, the set, the edits
        let table = [
            ("", "", ""),
            ("1.1.1.1,2.2.2.2", "1.1.1.1,2.2.2.2", ""),
            ("1.1.1.1,2.2.2.2", "", "add 1.1.1.1 0,add 2.2.2.2 0"),
            ("1.1.1.1,2.2.2.2,3.3.3.3", "2.2.2.2", "add 1.1.1.1 0,add 3.3.3.3 0"),
            ("", "1.1.1.1,2.2.2.0/24 90", "del 1.1.1.1,del 2.2.2.0/24"),
            ("2.2.2.2", "1.1.1.1,3.3.3.3", "del 1.1.1.1,del 3.3.3.3,add 2.2.2.2 0"),
            // Timeouts
            ("1.1.1.1 60", "1.1.1.1 57", ""),
            ("1.1.1.1 60", "1.1.1.1 63", ""),
            ("1.1.1.1 60", "1.1.1.1 56", "add 1.1.1.1 60"),
            ("1.1.1.1 60", "1.1.1.1 64", "add 1.1.1.1 60"),
            ("1.1.1.1 60", "1.1.1.1", "add 1.1.1.1 60"),
            ("1.1.1.1", "1.1.1.1 60", "add 1.1.1.1 0"),
            ("1.1.1.1", "1.1.1.1 3", "add 1.1.1.1 0"),
            ("1.1.1.1 9999999", "1.1.1.1 1073741", ""),
            ("1.1.1.1 9999999", "1.1.1.1 1073740", "add 1.1.1.1 2147483"),
            // nomatch
            ("1.1.1.1 9999999", "1.1.1.1 4294967295", "add 1.1.1.1 2147483"),
            ("1.1.1.1", "1.1.1.1 4294967295", "add 1.1.1.1 0"),
            ("", "1.1.1.1 4294967295", "del 1.1.1.1"),
            // Near an expiry
            ("1.1.1.1 3", "", ""),
            ("1.1.1.1 4", "", "add 1.1.1.1 4"),
            ("", "1.1.1.1 3", ""),
            ("", "1.1.1.1 4", "del 1.1.1.1"),
            // 9.9.9.9 is now in another set: it leaves this one last, unless there is no room.
            ("1.1.1.1", "1.1.1.1,8.8.8.8,9.9.9.9", "del 8.8.8.8,later 9.9.9.9"),
            ("1.1.1.1 60", "1.1.1.1,9.9.9.9", "add 1.1.1.1 60,later 9.9.9.9"),
            ("1.1.1.1", "8.8.8.8,9.9.9.9", "del 8.8.8.8,add 1.1.1.1 0,later 9.9.9.9"),
            ("1.1.1.1 3,2.2.2.2,3.3.3.3", "2.2.2.2,3.3.3.3,9.9.9.9", "later 9.9.9.9"),
            ("1.1.1.1,2.2.2.2", "2.2.2.2,8.8.8.8,9.9.9.9", "del 8.8.8.8,del 9.9.9.9,add 1.1.1.1 0"),
        ];
        for (wanted, actual, expected) in table {
            let list = list(wanted);
            let actual: Vec<_> =
                parse(actual).into_iter().map(|(net, left)| (net, left as u32)).collect();
            let (.., members) = list.sets().next().unwrap();
            let has_moved = |net: &Net| net.to_string() == "9.9.9.9";
            let SetPlan { edits, moved, missing, unknown } =
                plan("s", members, &actual, 3, has_moved, NOW);
            let lacks = |net: &Net| !actual.iter().any(|(held, _)| held == net);
            let is_missing =
                |edit: &&SetEdit| matches!(edit, SetEdit::Add { net, .. } if lacks(net));
            assert_eq!(missing, edits.iter().filter(is_missing).count());
            let is_deletion = |edit: &&SetEdit| matches!(edit, SetEdit::Delete { .. });
            assert_eq!(unknown, edits.iter().filter(is_deletion).count() + moved.len());
            let short =
                |edit: &SetEdit| edit.to_string().replace(" s ", " ").replace("timeout ", "");
            let later = moved.iter().map(|net| format!("later {net}"));
            let edits: Vec<String> = edits.iter().map(short).chain(later).collect();
            assert_eq!(edits.join(","), expected, "{wanted} {actual:?}");
        }
    }

    #[test]
    fn listings_that_agree() {
        // Two listings, the seconds between them
        let table = [
            ("1.1.1.1,2.2.2.2 9", "1.1.1.1,2.2.2.2 7", 2, true),
            ("1.1.1.1,2.2.2.2 3", "1.1.1.1", 2, true),
            ("1.1.1.1,2.2.2.2 3,3.3.3.3 1", "1.1.1.1", 2, true),
            ("1.1.1.1 1", "", 0, true),
            ("", "", 0, true),
            ("1.1.1.1,2.2.2.2 4", "1.1.1.1", 2, false),
            ("1.1.1.1,2.2.2.2 3", "2.2.2.2 1", 2, false),
            ("1.1.1.1", "", 2, false),
            ("1.1.1.1", "1.1.1.1,2.2.2.2 3", 2, false),
            ("2.2.2.2 3", "1.1.1.1", 2, false),
        ];
        let listing = |text| -> Option<Vec<_>> {
            Some(parse(text).into_iter().map(|(net, left)| (net, left as u32)).collect())
        };
        for (earlier, later, age, expected) in table {
            let (a, b, age) = (listing(earlier), listing(later), Duration::from_secs(age));
            assert_eq!(agree(&a, &b, age), expected, "{earlier} {later}");
        }
        let (empty, age) = (listing(""), Duration::ZERO);
        assert!(agree(&None, &None, age));
        assert!(!agree(&None, &empty, age) && !agree(&empty, &None, age));
    }

    #[test]
    fn sizes() {
        let list = list("1.1.1.1,2.2.2.2 3,3.3.3.3 4");
        let (.., members) = list.sets().next().unwrap();
        let right = |entries| has_right_size(members, entries, NOW);
        assert!([Some(2), Some(3), None].into_iter().all(right));
        assert!(![Some(0), Some(1), Some(4)].into_iter().any(right));
    }
}
