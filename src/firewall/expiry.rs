//! What expires when.

use crate::rule::Rule;
use std::collections::BTreeSet;

/// The expiries, sorted. A heap would do to find the next one; a sorted set
/// also gives back the one that is set anew, so no stale entry ever removes a
/// rule.
#[derive(Default, Debug)]
pub struct Expiries(BTreeSet<(u64, Rule)>);

impl Expiries {
    /// Notes that a rule expires in this second; `None` is never.
    pub fn add(&mut self, second: Option<u64>, rule: Rule) {
        self.0.extend(second.map(|second| (second, rule)));
    }

    /// Takes that back.
    pub fn remove(&mut self, second: Option<u64>, rule: Rule) {
        if let Some(second) = second {
            self.0.remove(&(second, rule));
        }
    }

    /// All that have expired by `now`, the first one first.
    pub fn due(&self, now: u64) -> impl Iterator<Item = Rule> {
        self.0.iter().take_while(move |(second, _)| *second <= now).map(|(_, rule)| *rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_anew_does_not_expire_before() {
        let rule = |last: u8| format!("/drop/input/any/192.0.2.{last}").parse::<Rule>().unwrap();
        let mut expiries = Expiries::default();
        expiries.add(Some(30), rule(3));
        expiries.add(Some(10), rule(1));
        expiries.add(Some(20), rule(2));
        expiries.add(None, rule(4));
        expiries.remove(Some(10), rule(1));
        expiries.add(Some(40), rule(1));
        let due = |expiries: &Expiries, now| expiries.due(now).collect::<Vec<_>>();
        assert_eq!(due(&expiries, 19), []);
        assert_eq!(due(&expiries, 30), [rule(2), rule(3)]);
        assert_eq!(due(&expiries, 40), [rule(2), rule(3), rule(1)]);
    }
}
