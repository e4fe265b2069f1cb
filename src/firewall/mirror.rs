//! What the kernel holds of rfw's, in memory, and the lines that take the
//! kernel from one state to another. Pure: no process, no clock.

use super::kernel::{Owned, Row, Tag};
use super::{Outcome, Verdict};
use crate::rule::whitelist::Whitelist;
use crate::rule::{Action, Chain, Change, Rule};
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Deleting a rule costs iptables a walk to it. Where the walks of a batch add
/// up to more than this many times all rules of the chain, it is cheaper to
/// delete all of rfw's, which costs no walk, and to insert the others again.
const WALKS: usize = 64;

/// Unix seconds of 2026-01-01: no clock that is right shows less.
const REAL_TIME: u64 = 1_767_225_600;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    /// Greater in rules that stand further in front.
    age: i64,
    tag: Tag,
}

/// Every rule of rfw's in one family.
#[derive(Default)]
pub struct Mirror {
    rules: HashMap<Rule, Entry>,
    /// A heap would do to find the next one; a sorted set also gives back the
    /// one that is set anew, so that no stale entry ever removes a rule.
    expiries: BTreeSet<(u64, Rule)>,
    youngest: i64,
    oldest: i64,
}

/// What changes have done to the mirror, so that it can be undone.
#[derive(Default)]
pub struct Batch {
    before: HashMap<Rule, Option<Entry>>,
    /// One for each change, in order.
    pub outcomes: Vec<Outcome>,
}

/// How to make the kernel hold what the mirror says.
#[derive(Default)]
pub struct Repair {
    /// To be committed in one transaction.
    pub lines: Vec<String>,
    /// What is put back or does not stay, for the log.
    pub notes: Vec<(Note, Rule)>,
}

/// A listing of one family, a chain each, front first.
pub type Listing = HashMap<Chain, Vec<Row>>;

/// What is to be told of a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Note {
    /// It was gone and is put back.
    Restored,
    /// Its time was over when rfw saw it.
    Expired,
    /// It has rfw's tag and does not stay, for this reason.
    Removed(&'static str),
}

/// What decides about a listed rule that the mirror does not know.
pub struct Law<'a> {
    /// Unix seconds.
    pub now: u64,
    pub whitelist: &'a Whitelist,
}

impl Law<'_> {
    /// Why it may not stay.
    fn objection(&self, Owned { rule, tag, .. }: &Owned) -> Option<Note> {
        match tag {
            Tag::Until(second) if *second <= self.now => Some(Note::Expired),
            Tag::Guard(_) => Some(Note::Removed("of no use as a guard any more")),
            _ if self.whitelist.conflict(rule).is_some() => Some(Note::Removed("whitelisted")),
            _ => None,
        }
    }
}

/// A place in a chain, and what is to become of it.
struct Slot {
    fate: Fate,
    row: Row,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Stays,
    Gone,
    New,
}

impl Mirror {
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Takes, at start, a rule that the kernel lists behind those before it:
    /// the kernel is the one that knows what was answered. `false` if the rule
    /// may not stay, or stands in front already.
    pub fn adopt(&mut self, owned: &Owned, law: &Law<'_>) -> bool {
        let wrong = !owned.tag.is_guard() && law.objection(owned).is_some();
        if wrong || self.rules.contains_key(&owned.rule) {
            return false;
        }
        self.oldest = self.oldest.saturating_sub(1);
        self.set(owned.rule, Some(Entry { age: self.oldest, tag: owned.tag }));
        true
    }

    /// Has these guard rules, front first, in front of all rules, and no others.
    pub fn guard(&mut self, guards: &[Owned]) {
        let old = self.rules.iter().filter(|(_, entry)| entry.tag.is_guard());
        let old: Vec<Rule> = old.map(|(rule, _)| *rule).collect();
        old.into_iter().for_each(|rule| self.set(rule, None));
        guards.iter().rev().for_each(|guard| self.add(guard.rule, guard.tag));
    }

    /// Takes a rule as its newest.
    pub fn add(&mut self, rule: Rule, tag: Tag) {
        self.youngest = self.youngest.saturating_add(1);
        self.set(rule, Some(Entry { age: self.youngest, tag }));
    }

    fn set(&mut self, rule: Rule, entry: Option<Entry>) {
        let old = match entry {
            Some(entry) => self.rules.insert(rule, entry),
            None => self.rules.remove(&rule),
        };
        let expiry = |entry: Option<Entry>| Some((entry?.tag.expires()?, rule));
        if let Some(old) = expiry(old) {
            self.expiries.remove(&old);
        }
        self.expiries.extend(expiry(entry));
    }

    /// The rules that have expired by `now`.
    pub fn due(&self, now: u64) -> Vec<Rule> {
        let due = self.expiries.iter().take_while(|(second, _)| *second <= now);
        due.map(|(_, rule)| *rule).collect()
    }

    /// Moves every expiry by the seconds that the wall clock, which had shown
    /// `before`, was set. Where that was no real time, as on a router that has
    /// just booted, an expiry in real time is of an earlier run, and right.
    pub fn shift(&mut self, before: u64, seconds: i64) {
        for (rule, Entry { age, tag }) in self.rules.clone() {
            let Tag::Until(second) = tag else { continue };
            if before >= REAL_TIME || second < REAL_TIME {
                let tag = Tag::Until(second.saturating_add_signed(seconds));
                self.set(rule, Some(Entry { age, tag }));
            }
        }
    }

    /// Carries out changes in the mirror, one after the other.
    pub fn apply(&mut self, changes: &[Change], now: u64) -> Batch {
        let mut batch = Batch::default();
        for Change { rule, action } in changes {
            let old = self.rules.get(rule).copied();
            let tag = match action {
                Action::Delete => None,
                Action::Put(0) => Some(Tag::Permanent),
                Action::Put(seconds) => Some(Tag::Until(now.saturating_add(*seconds))),
            };
            let verdict = match (old, tag) {
                (None, None) => Verdict::Absent,
                (Some(_), None) => Verdict::Deleted,
                (None, Some(_)) => Verdict::Inserted,
                (Some(old), Some(tag)) if old.tag == tag && !self.is_shadowed(rule, old.age) => {
                    Verdict::Exists
                }
                (Some(_), Some(_)) => Verdict::Refreshed,
            };
            let expires = tag.and_then(Tag::expires);
            batch.outcomes.push(Outcome { verdict, rule: *rule, expires });
            match (verdict, tag) {
                (Verdict::Exists | Verdict::Absent, _) => continue,
                (_, Some(tag)) => self.add(*rule, tag),
                (_, None) => self.set(*rule, None),
            }
            batch.before.entry(*rule).or_insert(old);
        }
        batch
    }

    /// Whether a newer rule decides otherwise about what this one is about.
    fn is_shadowed(&self, rule: &Rule, age: i64) -> bool {
        let otherwise = |other: &Rule| other.target != rule.target && other.overlaps(rule);
        self.rules.iter().any(|(other, e)| e.age > age && otherwise(other) && !e.tag.is_guard())
    }

    pub fn undo(&mut self, batch: Batch) {
        for (rule, entry) in batch.before {
            self.set(rule, entry);
        }
    }

    /// The lines that do to the kernel what the batch did to the mirror: first
    /// the deletions in chain order, because then the walk to each is
    /// shortest, then the insertions, the newest last. `None` if that would
    /// take longer than looking at the kernel for a better way.
    pub fn lines(&self, batch: &Batch) -> Option<Vec<String>> {
        let changed = batch.before.iter().map(|(rule, old)| (rule, old, self.rules.get(rule)));
        let changed = changed.filter(|(_, old, new)| old.as_ref() != *new);
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for (rule, before, after) in changed {
            gone.extend(before.map(|entry| (Reverse(entry.age), Owned::new(*rule, entry.tag))));
            new.extend(after.map(|entry| (entry.age, Owned::new(*rule, entry.tag))));
        }
        if gone.len() > WALKS {
            return None;
        }
        gone.sort_unstable_by_key(|(order, _)| *order);
        new.sort_unstable_by_key(|(order, _)| *order);
        let gone = gone.iter().map(|(_, owned)| owned.delete_line());
        Some(gone.chain(new.iter().map(|(_, owned)| owned.insert_line(1))).collect())
    }

    /// Starts to hold a listing against the mirror, row by row,
    /// which is cheap: it keeps nothing.
    pub fn compare(&self) -> Comparison<'_> {
        Comparison { mirror: self, left: self.rules.len(), above: HashMap::new(), same: true }
    }

    /// Works out how the kernel comes to hold what the mirror says, to which
    /// the batch is already done.
    pub fn repair(&self, mut listing: Listing, batch: &Batch, law: &Law<'_>) -> Repair {
        let mut repair = Repair::default();
        for chain in Chain::ALL {
            let mut above = i64::MAX;
            let mut kept = HashSet::new();
            let judge = |row: Row| {
                let stays = row.is_none_or(|owned| {
                    let age = self.place_of(&owned, batch, law, &mut repair);
                    let in_order = age.filter(|age| *age < above);
                    above = in_order.unwrap_or(above);
                    kept.extend(in_order.map(|_| owned.rule));
                    in_order.is_some()
                });
                Slot { fate: if stays { Fate::Stays } else { Fate::Gone }, row }
            };
            let rows = listing.remove(&chain).unwrap_or_default();
            let mut slots: Vec<Slot> = rows.into_iter().map(judge).collect();

            let missing =
                self.rules.iter().filter(|(rule, _)| rule.chain() == chain && !kept.contains(rule));
            let mut missing: Vec<_> = missing.map(|(rule, entry)| (*rule, *entry)).collect();
            missing.sort_unstable_by_key(|(_, entry)| Reverse(entry.age));
            if !missing.is_empty() {
                let rows = slots.iter().filter_map(|slot| slot.row);
                let listed: HashSet<Rule> = rows.map(|owned| owned.rule).collect();
                let known = |r: &Rule| listed.contains(r) || batch.before.contains_key(r);
                let lost = missing.iter().map(|(rule, _)| *rule).filter(|rule| !known(rule));
                repair.notes.extend(lost.map(|rule| (Note::Restored, rule)));
                slots = self.merged(slots, missing);
            }
            repair.arrange(&rewritten_if_cheaper(slots));
        }
        repair
    }

    /// The age of a listed rule that may stay, if its place is right. One that
    /// the mirror does not know, not at start, comes from an old save, or from
    /// a command that outlived an rfw: no request was answered for it.
    fn place_of(
        &self,
        owned: &Owned,
        batch: &Batch,
        law: &Law<'_>,
        repair: &mut Repair,
    ) -> Option<i64> {
        if batch.before.contains_key(&owned.rule) {
            return None;
        }
        if let Some(entry) = self.rules.get(&owned.rule) {
            return Some(entry.age).filter(|_| entry.tag == owned.tag);
        }
        let note = law.objection(owned).unwrap_or(Note::Removed("no request has made it"));
        repair.notes.push((note, owned.rule));
        None
    }

    /// The chain as it shall be: each missing rule before the first older one;
    /// where none is left, behind the last newer one, or in front.
    fn merged(&self, slots: Vec<Slot>, missing: Vec<(Rule, Entry)>) -> Vec<Slot> {
        let age = |slot: &Slot| {
            let owned = slot.row.filter(|_| slot.fate == Fate::Stays)?;
            self.rules.get(&owned.rule).map(|entry| entry.age)
        };
        let end = slots.iter().rposition(|slot| age(slot).is_some());
        let end = end.map_or(0, |last| last.saturating_add(1));
        let mut missing = missing.into_iter().peekable();
        let mut merged = Vec::new();
        for (at, slot) in slots.into_iter().enumerate() {
            let older = if at == end { Some(i64::MIN) } else { age(&slot) };
            while let Some((rule, entry)) =
                missing.next_if(|(_, m)| older.is_some_and(|a| m.age > a))
            {
                merged.push(Slot { fate: Fate::New, row: Some(Owned::new(rule, entry.tag)) });
            }
            merged.push(slot);
        }
        let rest = missing.map(|(rule, entry)| Some(Owned::new(rule, entry.tag)));
        merged.extend(rest.map(|row| Slot { fate: Fate::New, row }));
        merged
    }
}

impl Repair {
    /// Writes the lines for one chain: deletions in chain order, then
    /// insertions from the back to the front, each at its place among what is
    /// there by then.
    fn arrange(&mut self, slots: &[Slot]) {
        let mut insertions = Vec::new();
        let mut place = 1_usize;
        for slot in slots {
            match (slot.fate, &slot.row) {
                (Fate::Gone, Some(owned)) => self.lines.push(owned.delete_line()),
                (Fate::New, Some(owned)) => insertions.push(owned.insert_line(place)),
                _ => place = place.saturating_add(1),
            }
        }
        self.lines.extend(insertions.into_iter().rev());
    }
}

/// Where the walks to single rules cost more, makes every rule of rfw's go and
/// come again, with its counters.
fn rewritten_if_cheaper(slots: Vec<Slot>) -> Vec<Slot> {
    let (mut depth, mut walks) = (0_usize, 0_usize);
    for slot in &slots {
        match slot.fate {
            Fate::Stays => depth = depth.saturating_add(1),
            Fate::Gone => walks = walks.saturating_add(depth),
            Fate::New => {}
        }
    }
    if walks <= depth.saturating_mul(WALKS) {
        return slots;
    }
    let rewrite = |slot: Slot| {
        let again = Some(Slot { fate: Fate::New, row: slot.row });
        match slot.fate == Fate::Stays && slot.row.is_some() {
            true => [Some(Slot { fate: Fate::Gone, ..slot }), again],
            false => [Some(slot), None],
        }
    };
    slots.into_iter().flat_map(rewrite).flatten().collect()
}

/// A listing held against the mirror, row by row.
pub struct Comparison<'a> {
    mirror: &'a Mirror,
    /// How many rules are yet to come.
    left: usize,
    /// The age of the last rule in each chain.
    above: HashMap<Chain, i64>,
    same: bool,
}

impl Comparison<'_> {
    /// Takes the next row; `false` if the listing differs.
    pub fn row(&mut self, chain: Chain, row: Row) -> bool {
        if let Some(owned) = row {
            let entry = self.mirror.rules.get(&owned.rule).filter(|entry| entry.tag == owned.tag);
            // Ages that only fall are of rules in order, none of them twice.
            self.same &= entry.is_some_and(|entry| {
                self.above.insert(chain, entry.age).is_none_or(|above| above > entry.age)
            });
            self.left = self.left.saturating_sub(1);
        }
        self.same
    }

    /// Whether the whole listing showed what the mirror holds.
    pub fn is_same(&self) -> bool {
        self.same && self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::parse_row;
    use super::*;
    use crate::rule::net::Family;

    type Lines = &'static [&'static str];

    fn rule(path: &str) -> Rule {
        path.parse().expect(path)
    }

    /// `+PATH` is a PUT for ever, `+PATH 60` for 60 seconds, `-PATH` a DELETE.
    fn change(text: &str) -> Change {
        let (verb, rest) = text.split_at(1);
        let (path, seconds) = rest.split_once(' ').unwrap_or((rest, "0"));
        let put = Action::Put(seconds.parse().unwrap());
        Change { rule: rule(path), action: if verb == "+" { put } else { Action::Delete } }
    }

    fn changes(texts: &[&str]) -> Vec<Change> {
        texts.iter().map(|text| change(text)).collect()
    }

    fn mirror(texts: &[&str]) -> Mirror {
        let mut mirror = Mirror::default();
        mirror.apply(&changes(texts), 1_000);
        mirror
    }

    const A: &str = "+/drop/input/any/1.1.1.1";
    const B: &str = "+/drop/input/any/2.2.2.2";
    const C: &str = "+/drop/input/any/3.3.3.3";

    #[test]
    fn batches() {
        const ACCEPT: &str = "+/accept/input/any/1.1.1.0/24";
        let table: &[(Lines, Lines, &str, Lines)] = &[
            (&[], &[A], "Inserted", &["-I 1.1.1.1 rfw DROP"]),
            (&[A], &[A], "Exists", &[]),
            (&[A], &["-/drop/input/any/1.1.1.1"], "Deleted", &["-D 1.1.1.1 rfw DROP"]),
            (&[], &["-/drop/input/any/1.1.1.1"], "Absent", &[]),
            (&[], &[A, "-/drop/input/any/1.1.1.1"], "Inserted Deleted", &[]),
            (
                &[A],
                &["+/drop/input/any/1.1.1.1 60"],
                "Refreshed",
                &["-D 1.1.1.1 rfw DROP", "-I 1.1.1.1 rfw:1060 DROP"],
            ),
            (&["+/drop/input/any/1.1.1.1 60"], &["+/drop/input/any/1.1.1.1 60"], "Exists", &[]),
            (
                &[A],
                &["-/drop/input/any/1.1.1.1", A],
                "Deleted Inserted",
                &["-D 1.1.1.1 rfw DROP", "-I 1.1.1.1 rfw DROP"],
            ),
            // Deletions in chain order, insertions the newest last
            (
                &[A, B],
                &[
                    "-/drop/input/any/1.1.1.1",
                    C,
                    "-/drop/input/any/2.2.2.2",
                    "+/drop/input/any/4.4.4.4",
                ],
                "Deleted Inserted Deleted Inserted",
                &[
                    "-D 2.2.2.2 rfw DROP",
                    "-D 1.1.1.1 rfw DROP",
                    "-I 3.3.3.3 rfw DROP",
                    "-I 4.4.4.4 rfw DROP",
                ],
            ),
            // A newer rule decides otherwise, or about something else
            (&[A, ACCEPT], &[A], "Refreshed", &["-D 1.1.1.1 rfw DROP", "-I 1.1.1.1 rfw DROP"]),
            (&[ACCEPT, A], &[A], "Exists", &[]),
            (&[B, ACCEPT], &[B], "Exists", &[]),
        ];
        for (before, batch, verdicts, expected) in table {
            let mut mirror = mirror(before);
            let batch = mirror.apply(&changes(batch), 1_000);
            let said: Vec<_> = batch.outcomes.iter().map(|o| format!("{:?}", o.verdict)).collect();
            assert_eq!(
                (said.join(" ").as_str(), short(&mirror.lines(&batch).unwrap())),
                (*verdicts, expected.iter().map(|s| s.to_string()).collect()),
                "{before:?}"
            );
        }
    }

    /// The parts of `-I INPUT …` lines that vary in these tests.
    fn short(lines: &[String]) -> Vec<String> {
        let noise = ["INPUT", "-s", "-m", "comment", "--comment", "-j"];
        let words = |line: &String| {
            line.split(' ').filter(|w| !noise.contains(w)).collect::<Vec<_>>().join(" ")
        };
        lines.iter().map(words).collect()
    }

    #[test]
    fn what_fails_is_undone() {
        let mut mirror = mirror(&[A, "+/drop/input/any/2.2.2.2 60"]);
        let before = (mirror.rules.clone(), mirror.due(9_999));
        let batch = mirror
            .apply(&changes(&["+/drop/input/any/1.1.1.1 5", "-/drop/input/any/2.2.2.2", C]), 1_000);
        assert_ne!(mirror.rules, before.0);
        mirror.undo(batch);
        assert_eq!((mirror.rules.clone(), mirror.due(9_999)), before);
    }

    #[test]
    fn a_set_clock_moves_every_expiry() {
        let mut mirror = mirror(&[A, "+/drop/input/any/2.2.2.2 60"]);
        mirror.shift(REAL_TIME, -500);
        assert_eq!(mirror.due(559), []);
        assert_eq!(mirror.due(560), [rule("/drop/input/any/2.2.2.2")]);
        // Booted in 1970, with a rule of an earlier run beside one of this run.
        mirror.add(rule("/drop/input/any/3.3.3.3"), Tag::Until(REAL_TIME + 60));
        mirror.shift(100, REAL_TIME as i64);
        assert_eq!(mirror.due(REAL_TIME + 60), [rule("/drop/input/any/3.3.3.3")]);
        assert_eq!(mirror.due(REAL_TIME + 560).len(), 2);
    }

    fn listing(lines: &[&str]) -> Listing {
        let mut listing = Listing::new();
        for line in lines {
            let spec = match line.split(' ').collect::<Vec<_>>()[..] {
                ["foreign"] => "-j LOG".into(),
                [address, tag] => format!("-s {address}/32 -m comment --comment {tag} -j DROP"),
                _ => panic!("{line}"),
            };
            let (chain, row) = parse_row(&format!("-A INPUT {spec}"), Family::V4).unwrap();
            listing.entry(chain).or_default().push(row);
        }
        listing
    }

    #[test]
    fn repairs() {
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        const A1: &str = "1.1.1.1 rfw";
        const B1: &str = "2.2.2.2 rfw";
        const C1: &str = "3.3.3.3 rfw";
        // What the mirror knows, what the kernel holds, the lines, what is told
        let table: &[(Lines, Lines, Lines, &str)] = &[
            (&[A, B, C], &[C1, B1, A1], &[], ""),
            (&[A, B, C], &["foreign", C1, "foreign", B1, A1], &[], ""),
            (
                &[A, B, C],
                &[],
                &["-I 1.1.1.1 rfw DROP", "-I 2.2.2.2 rfw DROP", "-I 3.3.3.3 rfw DROP"],
                "Restored Restored Restored",
            ),
            (
                &[A, B, C],
                &["foreign"],
                &["-I 1.1.1.1 rfw DROP", "-I 2.2.2.2 rfw DROP", "-I 3.3.3.3 rfw DROP"],
                "Restored Restored Restored",
            ),
            (&[A, B, C], &[C1, "foreign", A1], &["-I 3 2.2.2.2 rfw DROP"], "Restored"),
            (&[A, B, C], &["foreign", B1, A1], &["-I 2 3.3.3.3 rfw DROP"], "Restored"),
            (&[A, B, C], &[C1, B1, "foreign"], &["-I 3 1.1.1.1 rfw DROP"], "Restored"),
            (&[A, B], &[B1, A1, A1], &["-D 1.1.1.1 rfw DROP"], ""),
            // Others have changed the order
            (&[A, B], &[A1, B1], &["-D 2.2.2.2 rfw DROP", "-I 2.2.2.2 rfw DROP"], ""),
            (
                &[A, B, C],
                &[B1, "foreign", C1, A1],
                &["-D 3.3.3.3 rfw DROP", "-I 3.3.3.3 rfw DROP"],
                "",
            ),
            (&[], &["1.1.1.1 rfw:7000", B1, A1], &["-D 1.1.1.1 rfw DROP"], ""),
            (&[A], &["1.1.1.1 rfw:7000"], &["-D 1.1.1.1 rfw:7000 DROP", "-I 1.1.1.1 rfw DROP"], ""),
            (
                &[A, B],
                &[B1, C1, A1],
                &["-D 3.3.3.3 rfw DROP"],
                "Removed(\"no request has made it\")",
            ),
            (&[], &["foreign", "1.1.1.1 rfw:7000", B1], &[], ""),
            (&[], &["1.1.1.1 rfw:1000", B1], &["-D 1.1.1.1 rfw:1000 DROP"], "Expired"),
            (&[], &["9.9.9.9 rfw"], &["-D 9.9.9.9 rfw DROP"], "Removed(\"whitelisted\")"),
        ];
        for (before, kernel, lines, told) in table {
            let mut mirror = mirror(before);
            let law = Law { now: 1_000, whitelist: &whitelist };
            if before.is_empty() {
                // As at start.
                let rows = listing(kernel).remove(&Chain::Input).unwrap_or_default();
                for owned in rows.iter().flatten() {
                    mirror.adopt(owned, &law);
                }
            }
            let repair = mirror.repair(listing(kernel), &Batch::default(), &law);
            let said = repair.notes.iter().map(|(note, _)| format!("{note:?}"));
            let said: Vec<String> = said.collect();
            assert_eq!(
                (short(&repair.lines), said.join(" ")),
                (lines.iter().map(|s| s.to_string()).collect(), told.to_string()),
                "{before:?} {kernel:?}"
            );
            // What the kernel shows then is what the mirror holds.
            let mut rows = listing(kernel).remove(&Chain::Input).unwrap_or_default();
            for line in &repair.lines {
                perform(line, &mut rows);
            }
            let mut again = mirror.compare();
            assert!(rows.iter().all(|row| again.row(Chain::Input, *row)) && again.is_same());
        }
    }

    /// Rules of an earlier run are older than any of this one.
    #[test]
    fn adopted_rules_come_back_in_front_of_what_others_have() {
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        let law = Law { now: 1_000, whitelist: &whitelist };
        let mut mirror = Mirror::default();
        for row in listing(&["2.2.2.2 rfw", "1.1.1.1 rfw"]).remove(&Chain::Input).unwrap() {
            assert!(mirror.adopt(&row.unwrap(), &law));
        }
        let repair = mirror.repair(listing(&["foreign", "foreign"]), &Batch::default(), &law);
        assert_eq!(short(&repair.lines), ["-I 1.1.1.1 rfw DROP", "-I 2.2.2.2 rfw DROP"]);
    }

    /// What iptables does with a line.
    fn perform(line: &str, rows: &mut Vec<Row>) {
        let words: Vec<&str> = line.split(' ').collect();
        let place = words[2].parse::<usize>();
        let spec = &words[if place.is_ok() { 3 } else { 2 }..].join(" ");
        let (_, row) = parse_row(&format!("-A INPUT {spec}"), Family::V4).unwrap();
        if words[0] == "-I" {
            return rows.insert(place.unwrap_or(1) - 1, row);
        }
        let same = |other: &Row| other.map(|o| (o.rule, o.tag)) == row.map(|o| (o.rule, o.tag));
        rows.remove(rows.iter().position(same).expect(line));
    }

    #[test]
    fn many_deletions_rewrite_the_chain_with_its_counters() {
        let paths: Vec<String> = (0..200).map(|n| format!("+/drop/input/any/10.0.0.{n}")).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let mut mirror = mirror(&paths);
        let mut kernel: Vec<String> = (0..200).rev().map(|n| format!("10.0.0.{n} rfw")).collect();
        kernel.insert(50, "foreign".into());
        let gone: Vec<String> = paths.iter().take(150).map(|p| p.replace('+', "-")).collect();
        let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
        let batch = mirror.apply(&changes(&gone), 1_000);
        assert_eq!(mirror.lines(&batch), None, "worth a look at the kernel");
        let kernel: Vec<&str> = kernel.iter().map(String::as_str).collect();
        let mut rows = listing(&kernel);
        rows.get_mut(&Chain::Input).unwrap()[0].as_mut().unwrap().counters = (5, 7);
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        let law = Law { now: 1_000, whitelist: &whitelist };
        let repair = mirror.repair(rows, &batch, &law);
        assert_eq!(repair.notes, []);
        let lines = short(&repair.lines);
        assert_eq!(lines.len(), 200 + 50);
        assert_eq!(lines[0], "-D 10.0.0.199 rfw DROP");
        assert_eq!(lines[199], "-D 10.0.0.0 rfw DROP");
        assert_eq!(lines[200], "-I 10.0.0.150 rfw DROP");
        assert_eq!(lines[249], "-I 10.0.0.199 rfw DROP -c 5 7");
    }

    #[test]
    fn a_large_batch_moves_what_it_refreshes() {
        let paths: Vec<String> = (0..99).map(|n| format!("+/drop/input/any/1.1.1.{n}")).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let mut mirror = mirror(&paths);
        mirror.apply(&changes(&["+/accept/input/any/1.1.1.0/24"]), 1_000);
        let kernel: Vec<String> = (0..99).rev().map(|n| format!("1.1.1.{n} rfw")).collect();
        let mut rows = listing(&kernel.iter().map(String::as_str).collect::<Vec<_>>());
        let accept = Owned::new(rule("/accept/input/any/1.1.1.0/24"), Tag::Permanent);
        rows.get_mut(&Chain::Input).unwrap().insert(0, Some(accept));
        let batch = mirror.apply(&changes(&paths), 1_000);
        assert_eq!(mirror.lines(&batch), None);
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        let law = Law { now: 1_000, whitelist: &whitelist };
        let lines = short(&mirror.repair(rows, &batch, &law).lines);
        assert_eq!(lines.len(), 2 * 100);
        assert_eq!(lines[100], "-I 1.1.1.0/24 rfw ACCEPT");
        assert_eq!(lines[199], "-I 1.1.1.98 rfw DROP");
    }
}
