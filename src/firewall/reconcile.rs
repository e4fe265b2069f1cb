//! Compares a listing of the kernel with the rules that it should hold, and derives the edits. Pure.
//!
//! Goals:
//!
//! 1. The wanted rules are at the front of the chain, each once, in their order.
//! 2. Foreign rules stay, in their order. No edit names one of them.
//! 3. Rules in the right place stay; a rule that moves keeps its counters.
//! 4. The edits of a chain take little more time than a listing.

use super::iptables::{KernelRule, RuleEdit, TaggedRule};
use crate::rule::Chain;
use std::collections::{HashMap, HashSet};

/// To delete a rule, iptables searches for it from the front of the chain. If the searches pass
/// more rules than the chain has, times this factor, it is cheaper to delete all of rfw's rules
/// from the front, where they are found at once, and to insert them again.
const MAX_WALKS: usize = 64;
/// How many rules iptables-nft deletes in one transaction, if it may be divided: for each, the kernel
/// passes all that the transaction has deleted before, and does nothing else on that processor. For
/// 70,000 this takes 90 s, and in parts of this size 10 s.
pub const MAX_DELETED: usize = 5_000;
/// If the rules that are not wanted are this many times as many as the others, iptables-nft deletes them
/// sooner behind the others, in parts, than in front of them.
const MANY: usize = 64;

/// One rule in a listing; `None` is a foreign rule.
pub type Row = Option<TaggedRule>;

/// The rules of one chain, from the front.
#[derive(Clone, Default, Debug)]
pub struct ChainListing {
    rows: Vec<Row>,
    /// The first foreign rule.
    first_foreign: Option<String>,
}

impl ChainListing {
    pub fn push(&mut self, row: Row, line: &str) {
        if row.is_none() && self.first_foreign.is_none() {
            self.first_foreign = Some(without_counters(line));
        }
        self.rows.push(row);
    }

    /// rfw's rules, each with its number in the chain, counted from 1.
    pub fn own(&self) -> impl Iterator<Item = (usize, &TaggedRule)> + Clone {
        (1..).zip(&self.rows).filter_map(|(number, row)| Some((number, row.as_ref()?)))
    }
}

/// The line of a rule without `-c PACKETS BYTES`, which differ from one listing to the next.
fn without_counters(line: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    if let Some(at) = words.iter().position(|word| *word == "-c") {
        words.drain(at..words.len().min(at.saturating_add(3)));
    }
    words.join(" ")
}

/// The rules of all built-in chains of one family, in the order of [`Chain::ALL`].
#[derive(Clone, Default, Debug)]
pub struct Listing(pub [ChainListing; Chain::ALL.len()]);

impl Listing {
    pub fn push(&mut self, chain: Chain, row: Row, line: &str) {
        if let Some(chain) = self.0.get_mut(chain as usize) {
            chain.push(row, line);
        }
    }

    /// rfw's rules, each with its number in its chain.
    pub fn own(&self) -> impl Iterator<Item = (usize, &TaggedRule)> {
        self.0.iter().flat_map(ChainListing::own)
    }

    /// Whether another listing shows the same rules of rfw; their counters may differ. Foreign rules may
    /// come and go meanwhile, as while a script adds hundreds of them.
    pub fn agrees_with(&self, other: &Listing) -> bool {
        let keys = |chain: &ChainListing| chain.own().map(|(_, tagged)| tagged.key()).collect();
        let keys = |listing: &Listing| -> Vec<Vec<_>> { listing.0.iter().map(keys).collect() };
        keys(self) == keys(other)
    }
}

/// How to make one chain hold the wanted rules.
#[derive(Default, Debug)]
pub struct Plan {
    /// To be committed in one transaction.
    pub edits: Vec<RuleEdit>,
    /// Whether the unknown rules are to be deleted after that.
    pub deletes_later: bool,
    /// The wanted rules that the chain lacked.
    pub missing: Vec<KernelRule>,
    /// rfw's rules that are not wanted.
    pub unknown: Vec<TaggedRule>,
    /// A foreign rule that preceded a wanted one.
    pub overtaken_by: Option<String>,
}

impl Plan {
    /// Whether the only fault is that foreign rules come first.
    pub fn is_only_overtaken(&self) -> bool {
        self.overtaken_by.is_some() && self.missing.is_empty() && self.unknown.is_empty()
    }
}

/// Whether the wanted rules are at the front of the chain, and none of rfw's is elsewhere.
pub fn is_right(chain: &ChainListing, wanted: impl Iterator<Item = TaggedRule>) -> bool {
    let front = chain.rows.iter().map_while(Option::as_ref).map(TaggedRule::key);
    front.clone().count() == chain.own().count() && front.eq(wanted.map(|tagged| tagged.key()))
}

/// Plans the edits after which the wanted rules are at the front of the chain.
pub fn plan(chain: &ChainListing, wanted: &[TaggedRule]) -> Plan {
    if is_right(chain, wanted.iter().copied()) {
        return Plan::default();
    }
    // A chain without an rfw rule, as after a reboot, has none to look up.
    let known = if chain.own().next().is_none() { &[] } else { wanted };
    let numbers: HashMap<KernelRule, usize> = known.iter().map(|t| t.rule).zip(0..).collect();
    let is_known = |tagged: &TaggedRule| numbers.contains_key(&tagged.rule);
    let own = chain.own().map(|(_, tagged)| tagged);
    let unknown: Vec<_> = own.clone().filter(|tagged| !is_known(tagged)).copied().collect();
    let deletes_later = may_delete_later(&unknown, wanted)
        && own.skip_while(|tagged| is_known(tagged)).count() == unknown.len();
    let mut stays = rows_that_stay(chain, wanted, &numbers);
    if is_slow(walks(&stays, chain), chain.rows.len()) {
        stays.fill(None);
    }
    let listed: HashMap<KernelRule, Option<(u64, u64)>> =
        chain.own().map(|(_, tagged)| (tagged.rule, tagged.counters)).collect();
    let mut from_foreign = chain.rows.iter().skip_while(|row| row.is_some()).flatten();
    let is_overtaken = from_foreign.any(is_known);
    let mut edits = edits(chain, wanted, &stays, &listed);
    if deletes_later {
        edits.retain(|edit| is_known(edit.tagged()));
    }
    let missing = wanted.iter().map(|tagged| tagged.rule);
    Plan {
        edits,
        deletes_later,
        missing: missing.filter(|rule| !listed.contains_key(rule)).collect(),
        unknown,
        overtaken_by: chain.first_foreign.clone().filter(|_| is_overtaken),
    }
}

/// For each row that can stay, the number of the wanted rule that it is: it precedes all foreign
/// rules, follows the wanted rules that precede it, and no row that iptables cannot tell from it is
/// deleted further back: `-D` would delete this one instead.
fn rows_that_stay(
    chain: &ChainListing,
    wanted: &[TaggedRule],
    numbers: &HashMap<KernelRule, usize>,
) -> Vec<Option<usize>> {
    let mut next = 0_usize;
    let mut before_foreign = true;
    let stays = |row: &Row| {
        before_foreign &= row.is_some();
        let tagged = row.filter(|_| before_foreign)?;
        let number = numbers.get(&tagged.rule).filter(|number| **number >= next)?;
        wanted.get(*number).filter(|wanted| wanted.expires == tagged.expires)?;
        next = number.saturating_add(1);
        Some(*number)
    };
    let mut stays: Vec<_> = chain.rows.iter().map(stays).collect();
    let mut deleted = HashSet::new();
    for (row, stays) in chain.rows.iter().zip(&mut stays).rev() {
        let Some(key) = row.map(|tagged| tagged.deletion_key()) else { continue };
        if stays.is_none() || deleted.contains(&key) {
            *stays = None;
            deleted.insert(key);
        }
    }
    stays
}

/// Whether few rules replace many, as at the switch to sets, and `-D` tells them apart.
fn may_delete_later(unknown: &[TaggedRule], wanted: &[TaggedRule]) -> bool {
    if unknown.len() <= MAX_DELETED || !(1..=unknown.len() / MANY).contains(&wanted.len()) {
        return false;
    }
    let keys: HashSet<_> = wanted.iter().map(TaggedRule::deletion_key).collect();
    !unknown.iter().any(|tagged| keys.contains(&tagged.deletion_key()))
}

/// Whether the searches for those that are deleted pass too many rules of a chain.
pub fn is_slow(walks: usize, rows: usize) -> bool {
    walks > rows.saturating_mul(MAX_WALKS)
}

/// How many rules iptables passes in its searches for those that are deleted.
fn walks(stays: &[Option<usize>], chain: &ChainListing) -> usize {
    let (mut passed, mut walks) = (0_usize, 0_usize);
    for (row, stays) in chain.rows.iter().zip(stays) {
        match (row, stays) {
            (Some(_), None) => walks = walks.saturating_add(passed),
            _ => passed = passed.saturating_add(1),
        }
    }
    walks
}

/// First the deletions in the order of the chain, so that each search is short; then the
/// insertions from the last to the first, each after the rules that precede it and stay.
fn edits(
    chain: &ChainListing,
    wanted: &[TaggedRule],
    stays: &[Option<usize>],
    counters: &HashMap<KernelRule, Option<(u64, u64)>>,
) -> Vec<RuleEdit> {
    let deleted = chain.rows.iter().zip(stays).filter(|(_, stays)| stays.is_none());
    let mut edits: Vec<_> = deleted.filter_map(|(row, _)| row.map(RuleEdit::Delete)).collect();
    let mut staying = stays.iter().flatten().rev().peekable();
    let mut number = stays.iter().flatten().count().saturating_add(1);
    for (index, tagged) in wanted.iter().enumerate().rev() {
        if staying.next_if_eq(&&index).is_some() {
            number = number.saturating_sub(1);
        } else {
            let counters = counters.get(&tagged.rule).copied().unwrap_or_default();
            edits.push(RuleEdit::Insert(number, TaggedRule { counters, ..*tagged }));
        }
    }
    edits
}

#[cfg(test)]
mod tests {
    use super::super::iptables::parse_row;
    use super::super::list::tests::numbers;
    use super::*;
    use crate::rule::net::Family;

    const FOREIGN: &str = "-A INPUT -j LOG";

    /// `A` is a rule, `a` the same with an old expiry.
    fn tagged(letter: char) -> TaggedRule {
        let path = format!("/drop/input/any/{0}.{0}.{0}.{0}", letter.to_ascii_uppercase() as u32);
        let expires = letter.is_lowercase().then_some(7_000);
        TaggedRule::new(KernelRule::plain(path.parse().unwrap()), expires)
    }

    fn letter(tagged: &TaggedRule) -> char {
        let letters = ('A'..='Z').chain('a'..='z');
        letters.into_iter().find(|letter| self::tagged(*letter).key() == tagged.key()).unwrap()
    }

    /// A letter for each rule of rfw, a dot for a foreign one; the line of each is its number.
    fn chain(rows: &str) -> ChainListing {
        let mut chain = ChainListing::default();
        for (number, row) in rows.chars().enumerate() {
            chain.push((row != '.').then(|| tagged(row)), &number.to_string());
        }
        chain
    }

    fn wanted(letters: &str) -> Vec<TaggedRule> {
        letters.chars().map(tagged).collect()
    }

    /// Applies edits as iptables does. Foreign rows are distinguished by their numbers.
    fn perform<T: Clone>(edits: &[RuleEdit], rows: &mut Vec<Result<TaggedRule, T>>) {
        for edit in edits {
            match edit {
                RuleEdit::Insert(number, tagged) => rows.insert(number - 1, Ok(*tagged)),
                RuleEdit::Delete(tagged) => {
                    let is_it = |row: &Result<TaggedRule, T>| {
                        row.as_ref().is_ok_and(|row| row.key() == tagged.key())
                    };
                    let at = rows.iter().position(is_it).expect("a rule to delete");
                    let _ = rows.remove(at);
                }
            }
        }
    }

    #[test]
    fn plans() {
        // The wanted rules, the chain, the edits, the missing and the unknown rules, whether a
        // foreign rule was in front
        let table = [
            ("", "", "", "", "", false),
            ("", "..", "", "", "", false),
            ("ABC", "ABC", "", "", "", false),
            ("ABC", "ABC.", "", "", "", false),
            // A flush
            ("ABC", "", "+1C +1B +1A", "ABC", "", false),
            ("ABC", ".", "+1C +1B +1A", "ABC", "", false),
            // Single rules removed
            ("ABC", "BC", "+1A", "A", "", false),
            ("ABC", "AC.", "+2B", "B", "", false),
            ("ABC", "AB..", "+3C", "C", "", false),
            ("ABCD", "BD", "+2C +1A", "AC", "", false),
            ("ABCD", "AD.", "+2C +2B", "BC", "", false),
            // Foreign rules in front or between
            ("AB", ".AB", "-A -B +1B +1A", "", "", true),
            ("AB", "A.B", "-B +2B", "", "", true),
            ("ABC", ".AB", "-A -B +1C +1B +1A", "C", "", true),
            ("ABC", "A.B.C", "-B -C +2C +2B", "", "", true),
            // Others have changed the order
            ("AB", "BA", "-A +1A", "", "", false),
            ("ABC", "CAB", "-A -B +1B +1A", "", "", false),
            ("ABC", "BAC", "-A +1A", "", "", false),
            // Twice
            ("AB", "AAB", "-A -A +1A", "", "", false),
            ("AB", "ABA", "-A -A +1A", "", "", false),
            ("AB", "AB.B", "-B -B +2B", "", "", true),
            // Old expiries
            ("AB", "aB", "-a +1A", "", "", false),
            ("AB", "aAB", "-a", "", "", false),
            ("AB", "ABa", "-a", "", "", false),
            ("a", "A", "-A +1a", "", "", false),
            // Not in the list
            ("", "AB", "-A -B", "", "AB", false),
            ("B", "AB", "-A", "", "A", false),
            ("A", "ABcB.", "-B -c -B", "", "BcB", false),
            ("A", "A.B", "-B", "", "B", false),
            ("AC", "CX.A", "-X -A +1A", "", "X", true),
            // All at once
            ("ABCD", "b.A.DAx", "-b -A -D -A -x +1D +1C +1B +1A", "C", "x", true),
        ];
        for (wanted_rules, rows, edits, missing, unknown, is_overtaken) in table {
            let plan = plan(&chain(rows), &wanted(wanted_rules));
            let show = |edit: &RuleEdit| match edit {
                RuleEdit::Delete(tagged) => format!("-{}", letter(tagged)),
                RuleEdit::Insert(number, tagged) => format!("+{number}{}", letter(tagged)),
            };
            let shown: Vec<String> = plan.edits.iter().map(show).collect();
            let case = format!("{wanted_rules} {rows}");
            assert_eq!(shown.join(" "), edits, "{case}");
            let rules = |letters: &str| wanted(letters).iter().map(|t| t.rule).collect::<Vec<_>>();
            assert_eq!(plan.missing, rules(missing), "{case}");
            assert_eq!(plan.unknown.iter().map(letter).collect::<String>(), unknown, "{case}");
            let first = rows.find('.').filter(|_| is_overtaken).map(|number| number.to_string());
            assert_eq!(plan.overtaken_by, first, "{case}");
            let only = is_overtaken && missing.is_empty() && unknown.is_empty();
            assert_eq!(plan.is_only_overtaken(), only, "{case}");
        }
    }

    /// Whatever the kernel holds, the edits put rfw's rules in front, in order, each once and with
    /// its counters, and change nothing else.
    #[test]
    fn edits_lead_to_the_wanted_rules() {
        for seed in 0..3_000 {
            let mut below = numbers(seed);
            let pool: Vec<char> = ".ABCDEFabc".chars().take(2 + below(9)).collect();
            let length = below(13);
            let mut rows: Vec<Result<TaggedRule, usize>> = Vec::new();
            let mut chain = ChainListing::default();
            for number in 0..length {
                let row = match pool[below(pool.len())] {
                    '.' => Err(number),
                    letter => {
                        Ok(TaggedRule { counters: Some((number as u64 + 1, 7)), ..tagged(letter) })
                    }
                };
                chain.push(row.ok(), FOREIGN);
                rows.push(row);
            }
            let mut letters: Vec<char> = "ABCDEFGH".chars().collect();
            for at in 0..letters.len() {
                letters.swap(at, below(8));
            }
            let wanted: Vec<_> = letters.into_iter().take(below(9)).map(tagged).collect();
            let before = rows.clone();
            let plan = plan(&chain, &wanted);
            perform(&plan.edits, &mut rows);
            let (own, others) = rows.split_at(wanted.len());
            let keys = |rules: &[TaggedRule]| rules.iter().map(|t| t.key()).collect::<Vec<_>>();
            let own: Vec<TaggedRule> = own.iter().map(|row| row.unwrap()).collect();
            assert_eq!(keys(&own), keys(&wanted), "{seed}");
            let foreign = before.iter().filter(|row| row.is_err());
            assert!(others.iter().eq(foreign), "{seed}: {before:?} {rows:?}");
            for tagged in &own {
                let listed = before.iter().flatten().filter(|other| other.rule == tagged.rule);
                let counters: Vec<_> = listed.map(|other| other.counters).collect();
                let is_missing = plan.missing.contains(&tagged.rule);
                assert_eq!(counters.is_empty(), is_missing, "{seed}");
                let is_kept = counters.contains(&tagged.counters);
                assert!(is_kept || is_missing && tagged.counters.is_none(), "{seed}");
            }
            // Afterwards, no more edits are needed.
            let mut again = ChainListing::default();
            rows.iter().for_each(|row| again.push(row.ok(), FOREIGN));
            let again = super::plan(&again, &wanted);
            assert!(again.edits.is_empty() && again.overtaken_by.is_none(), "{seed}");
        }
    }

    /// To delete a rule after many others, iptables walks past each of them.
    #[test]
    fn many_deletions_rewrite_the_chain_with_its_counters() {
        let rule = |number: usize| {
            let path = format!("/drop/input/any/10.0.{}.{}", number / 256, number % 256);
            let counters = Some((number as u64, 1));
            TaggedRule {
                counters,
                ..TaggedRule::new(KernelRule::plain(path.parse().unwrap()), None)
            }
        };
        // The numbers of rules that stay, of foreign ones, and of deleted ones after both: 128 *
        // 128 is 64 times 256 rules, 129 * 129 is more than 64 times 258.
        let table = [
            (128, 0, 128, false),
            (129, 0, 129, true),
            (100, 28, 128, false),
            (100, 29, 129, true),
        ];
        for (staying, foreign, deleted, is_rewritten) in table {
            let mut chain = ChainListing::default();
            let wanted: Vec<TaggedRule> = (0..staying).map(rule).collect();
            let unknown: Vec<TaggedRule> = (staying..staying + deleted).map(rule).collect();
            wanted.iter().for_each(|tagged| chain.push(Some(*tagged), ""));
            (0..foreign).for_each(|_| chain.push(None, FOREIGN));
            unknown.iter().for_each(|tagged| chain.push(Some(*tagged), ""));
            let plan = plan(&chain, &wanted);
            assert_eq!(plan.unknown, unknown);
            let moved = wanted.iter().filter(|_| is_rewritten);
            let deletions = moved.clone().chain(&unknown).map(|tagged| RuleEdit::Delete(*tagged));
            let insertions = moved.rev().map(|tagged| RuleEdit::Insert(1, *tagged));
            assert_eq!(plan.edits, deletions.chain(insertions).collect::<Vec<_>>());
        }
    }

    /// iptables-nft took minutes to replace 100,000 rules with those of sets, and the kernel did nothing
    /// else on that processor.
    #[test]
    fn many_rules_that_few_replace_are_deleted_afterwards() {
        let path = |path: String| TaggedRule::new(KernelRule::plain(path.parse().unwrap()), None);
        let unknown =
            |number: usize| path(format!("/drop/input/any/10.0.{}.{}", number / 256, number % 256));
        let wanted = |number: usize| path(format!("/accept/input/any/11.0.0.{number}"));
        let twin = path("/drop/input/any/10.0.0.0/24".into());
        // The numbers of rules that are wanted and listed, wanted only, unknown, and wanted behind these
        let table = [
            (1, 1, MAX_DELETED, 0, false),
            (1, 1, MAX_DELETED + 1, 0, true),
            (0, 1, MAX_DELETED + 1, 0, true),
            (77, 1, 78 * MANY, 0, false),
            (78, 1, 79 * MANY, 0, true),
            (78, 2, 79 * MANY, 0, false),
            (0, 0, MAX_DELETED + 1, 0, false),
            // One that follows them would be moved, and iptables would search for it behind all of them.
            (0, 1, 79 * MANY, 1, false),
        ];
        for (listed, missing, count, behind, is_later) in table {
            let mut chain = ChainListing::default();
            (0..listed).for_each(|number| chain.push(Some(wanted(number)), ""));
            (0..count).for_each(|number| chain.push(Some(unknown(number)), ""));
            let mut rules: Vec<_> = (0..listed + missing + behind).map(wanted).collect();
            let last = rules.iter().skip(listed + missing);
            last.for_each(|tagged| chain.push(Some(*tagged), ""));
            let case = format!("{listed} {missing} {count} {behind}");
            let with = plan(&chain, &rules);
            assert_eq!(with.deletes_later, is_later, "{case}");
            assert_eq!(with.unknown.len(), count, "{case}");
            let unwanted = |edit: &&RuleEdit| !rules.contains(edit.tagged());
            let deleted = with.edits.iter().filter(unwanted).count();
            assert_eq!(deleted, if is_later { 0 } else { count }, "{case}");
            // -D would find this one instead of an unknown rule behind it.
            rules.push(twin);
            assert!(!plan(&chain, &rules).deletes_later, "{case}");
        }
    }

    fn listing(lines: &[&str]) -> Listing {
        let mut listing = Listing::default();
        for line in lines {
            let (chain, row) = parse_row(line, Family::V4).unwrap();
            listing.push(chain, row, line);
        }
        listing
    }

    #[test]
    fn listings() {
        const A: &str = "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -c 5 7 -j DROP";
        const B: &str = "-A FORWARD -s 2.2.2.2/32 -m comment --comment rfw -c 5 7 -j DROP";
        const C: &str = "-A OUTPUT -d 3.3.3.3/32 -m comment --comment rfw:7 -c 5 7 -j DROP";
        let both = listing(&["-A INPUT -c 1 2 -j LOG", A, B, "-A INPUT -c 1 2 -j LOG", C]);
        let own =
            |chain| both.0[chain as usize].own().map(|(number, t)| format!("{number} {}", t.rule));
        assert_eq!(own(Chain::Input).collect::<Vec<_>>(), ["2 /drop/input/any/1.1.1.1"]);
        assert_eq!(own(Chain::Forward).collect::<Vec<_>>(), ["1 /drop/forward/any/2.2.2.2"]);
        assert_eq!(own(Chain::Output).collect::<Vec<_>>(), ["1 /drop/output/any/3.3.3.3"]);
        let counted = |line: &str| line.replace("-c 5 7", "-c 6 9");
        let table: &[(&[&str], bool)] = &[
            (&["-A INPUT -c 1 2 -j LOG", A, B, "-A INPUT -c 1 2 -j LOG", C], true),
            // Packets have passed
            (&["-A INPUT -c 3 4 -j LOG", A, B, "-A INPUT -c 3 4 -j LOG", C], true),
            (
                &["-A INPUT -c 1 2 -j LOG", &counted(A), B, "-A INPUT -c 1 2 -j LOG", &counted(C)],
                true,
            ),
            // Another program has inserted or deleted a rule of its own
            (&[A, "-A INPUT -c 1 2 -j LOG", B, "-A INPUT -c 1 2 -j LOG", C], true),
            (&["-A INPUT -c 1 2 -j LOG", A, B, C], true),
            (&["-A INPUT -c 1 2 -j LOG", A, A, B, "-A INPUT -c 1 2 -j LOG", C], false),
            (&["-A INPUT -c 1 2 -j LOG", A, B, "-A INPUT -c 1 2 -j LOG"], false),
            (
                &["-A INPUT -c 1 2 -j LOG", A, B, "-A INPUT -c 1 2 -j LOG", &C.replace(":7", ":8")],
                false,
            ),
            (&[], false),
        ];
        for (lines, agrees) in table {
            assert_eq!(listing(lines).agrees_with(&both), *agrees, "{lines:?}");
        }
    }
}
