//! What the kernel holds of rfw's, in memory, and the lines that take the
//! kernel from one state to another. Pure: no process, no clock.

use super::kernel::{Edit, Kind, Line, Owned, Row};
use super::{Outcome, Tally, Verdict};
use crate::rule::net::Family;
use crate::rule::whitelist::Whitelist;
use crate::rule::{Action, Chain, Change, Rule, Target};
use crate::state::{Kept, Wanted};
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Deleting a rule costs iptables a walk to it. Where the walks of a batch add
/// up to more than this many times all rules of the chain, it is cheaper to
/// delete all of rfw's, which costs no walk, and to insert the others again.
const WALKS: usize = 64;

/// Among more rules than this that may decide otherwise, nobody looks which do:
/// a rule behind any of them is set anew.
const MAX_RIVALS: usize = 1_000;

/// Unix seconds of 2026-01-01: no clock that is right shows less.
pub const REAL_TIME: u64 = 1_767_225_600;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    /// Greater in rules that stand further in front.
    age: i64,
    /// Unix seconds; plain rules only.
    expires: Option<u64>,
}

/// The least age of a rule for a set: these stand in front of all others.
const SETS: i64 = 1 << 60;

/// How far in front of other rules those for sets stand; no count of changes
/// comes near half of it.
fn lead(line: &Line) -> i64 {
    match (line.kind, line.rule.target) {
        (Kind::Plain | Kind::Guard(_), _) => 0,
        (_, Target::Drop) => 3 << 59,
        (_, Target::Reject) => 5 << 59,
        (_, Target::Accept) => 7 << 59,
    }
}

/// Every rule of rfw's in one family.
#[derive(Default)]
pub struct Mirror {
    rules: HashMap<Line, Entry>,
    /// A heap would do to find the next one; a sorted set also gives back the
    /// one that is set anew, so that no stale entry ever removes a rule.
    expiries: BTreeSet<(u64, Rule)>,
    youngest: i64,
    oldest: i64,
    /// How many of the rules are for sets.
    sets: usize,
}

/// What became of one line.
struct Step {
    line: Line,
    before: Option<Entry>,
    after: Option<Entry>,
}

/// What changes have done to the mirror, so that it can be undone.
#[derive(Default)]
pub struct Batch {
    /// Each line once.
    steps: Vec<Step>,
    /// One for each change, in order.
    pub outcomes: Vec<Outcome>,
}

impl Batch {
    /// What becomes of rules, for the state file: the newest last.
    pub fn wanted(&self) -> Vec<Wanted> {
        let changed = self.steps.iter().filter(|s| s.before != s.after);
        let mut changed: Vec<_> = changed.filter(|s| s.line.kind == Kind::Plain).collect();
        changed.sort_by_key(|step| step.after.map(|entry| entry.age));
        let wanted = |step: &Step| (step.line.rule, step.after.map(|entry| entry.expires));
        changed.into_iter().map(wanted).collect()
    }
}

/// How to make the kernel hold what the mirror says.
#[derive(Default)]
pub struct Repair {
    /// To be committed in one transaction.
    pub edits: Vec<Edit>,
    /// What is put back or does not stay, for the log.
    pub notes: Vec<(Note, Line)>,
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
    fn objection(&self, Owned { line, expires, .. }: &Owned) -> Option<Note> {
        if expires.is_some_and(|second| second <= self.now) {
            return Some(Note::Expired);
        }
        if line.is_guard() {
            return Some(Note::Removed("of no use as a guard any more"));
        }
        self.whitelist.conflict(&line.rule).map(|_| Note::Removed("whitelisted"))
    }
}

/// An expiry after the wall clock, which had shown `before`, was set by so many
/// seconds. Where that was no real time, as on a router that has just booted, an
/// expiry in real time is of an earlier run, and right.
pub fn moved(second: u64, before: u64, seconds: i64) -> u64 {
    match before >= REAL_TIME || second < REAL_TIME {
        true => second.saturating_add_signed(seconds),
        false => second,
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

impl Slot {
    fn new((line, entry): (Line, Entry)) -> Slot {
        Slot { fate: Fate::New, row: Some(Owned::new(line, entry.expires)) }
    }
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
        let wrong = !owned.line.is_guard() && law.objection(owned).is_some();
        if wrong || self.rules.contains_key(&owned.line) {
            return false;
        }
        self.oldest = self.oldest.saturating_sub(1);
        let age = self.oldest.saturating_add(lead(&owned.line));
        self.set(owned.line, Some(Entry { age, expires: owned.expires }));
        true
    }

    /// Has these guard rules, front first, in front of the plain ones, and no
    /// others.
    pub fn guard(&mut self, guards: &[Owned]) {
        let old = self.rules.keys().filter(|line| line.is_guard());
        let old: Vec<Line> = old.copied().collect();
        for line in old {
            self.set(line, None);
        }
        guards.iter().rev().for_each(|guard| self.add(guard.line, None));
    }

    /// Takes a rule as the newest of its kind.
    pub fn add(&mut self, line: Line, expires: Option<u64>) {
        let entry = self.newest(&line, expires);
        self.set(line, Some(entry));
    }

    fn newest(&mut self, line: &Line, expires: Option<u64>) -> Entry {
        self.youngest = self.youngest.saturating_add(1);
        Entry { age: self.youngest.saturating_add(lead(line)), expires }
    }

    /// Returns what was there.
    fn set(&mut self, line: Line, entry: Option<Entry>) -> Option<Entry> {
        let old = match entry {
            Some(entry) => self.rules.insert(line, entry),
            None => self.rules.remove(&line),
        };
        let expiry = |entry: Option<Entry>| Some((entry?.expires?, line.rule));
        if let Some(old) = expiry(old) {
            self.expiries.remove(&old);
        }
        self.expiries.extend(expiry(entry));
        if line.place().is_some() {
            let count = |entry: Option<Entry>| usize::from(entry.is_some());
            self.sets = self.sets.saturating_sub(count(old)).saturating_add(count(entry));
        }
        old
    }

    /// The rules that have expired by `now`.
    pub fn due(&self, now: u64) -> Vec<Rule> {
        let due = self.expiries.iter().take_while(|(second, _)| *second <= now);
        due.map(|(_, rule)| *rule).collect()
    }

    /// Moves every expiry.
    pub fn shift(&mut self, moved: impl Fn(u64) -> u64) {
        for (line, Entry { age, expires }) in self.rules.clone() {
            if let Some(second) = expires {
                self.set(line, Some(Entry { age, expires: Some(moved(second)) }));
            }
        }
    }

    /// Carries out changes in the mirror, one after the other, as far as they
    /// are of one family.
    pub fn apply(&mut self, changes: &[&Change], family: Family, now: u64) -> Batch {
        let mut batch = Batch::default();
        for change in changes {
            let put = match change.action {
                Action::Delete => None,
                Action::Put(0) => Some(None),
                Action::Put(seconds) => Some(Some(now.saturating_add(seconds))),
            };
            let (mut tally, mut rivals) = (Tally::default(), None);
            for rule in change.rules.of(family) {
                let line = Line::plain(rule);
                let after = put.map(|expires| self.newest(&line, expires));
                let before = self.set(line, after);
                let verdict = match (before, after) {
                    (None, None) => Verdict::Absent,
                    (Some(_), None) => Verdict::Deleted,
                    (None, Some(_)) => Verdict::Inserted,
                    (Some(old), Some(new)) => {
                        let rivals = rivals.get_or_insert_with(|| self.rivals(&rule));
                        let mut newer = rivals.iter().take_while(|(age, _)| *age > old.age);
                        let many = rivals.len() > MAX_RIVALS;
                        let shadowed = newer.any(|(_, other)| many || other.overlaps(&rule));
                        match old.expires == new.expires && !shadowed {
                            true => Verdict::Exists,
                            false => Verdict::Refreshed,
                        }
                    }
                };
                tally.add(verdict, 1);
                if verdict == Verdict::Exists {
                    self.set(line, before);
                } else if verdict != Verdict::Absent {
                    batch.steps.push(Step { line, before, after });
                }
            }
            batch.outcomes.push(Outcome { tally, expires: put.flatten() });
        }
        // No line comes twice in one change, but in several it may.
        if changes.len() > 1 {
            let mut seen = HashSet::new();
            batch.steps.retain(|step| seen.insert(step.line));
            for step in &mut batch.steps {
                step.after = self.rules.get(&step.line).copied();
            }
        }
        batch
    }

    /// The rules of rfw's in a rule's chain that may decide otherwise about it,
    /// where they are newer; the newest first.
    fn rivals(&self, rule: &Rule) -> Vec<(i64, Rule)> {
        let rivals = self.rules.iter().filter(|(Line { rule: other, kind }, _)| {
            let otherwise = other.target != rule.target && other.chain() == rule.chain();
            *kind == Kind::Plain && otherwise
        });
        let mut rivals: Vec<_> = rivals.map(|(line, entry)| (entry.age, line.rule)).collect();
        rivals.sort_unstable_by_key(|(age, _)| Reverse(*age));
        rivals
    }

    /// Has one rule, with this expiry, or has it not; the batch has no part in
    /// it yet.
    pub fn have(&mut self, line: Line, wanted: Option<Option<u64>>, batch: &mut Batch) {
        let after = wanted.map(|expires| self.newest(&line, expires));
        let before = self.set(line, after);
        batch.steps.push(Step { line, before, after });
    }

    pub fn has(&self, line: &Line) -> bool {
        self.rules.contains_key(line)
    }

    pub fn lines(&self) -> impl Iterator<Item = &Line> {
        self.rules.keys()
    }

    /// The rules for sets, the foremost last.
    pub fn sets(&self) -> Vec<Line> {
        let sets = self.rules.iter().filter(|(line, _)| self.sets > 0 && line.place().is_some());
        let mut sets: Vec<_> = sets.map(|(line, entry)| (entry.age, *line)).collect();
        sets.sort_unstable();
        sets.into_iter().map(|(_, line)| line).collect()
    }

    /// The plain rules, the oldest first.
    pub fn plain(&self) -> Vec<Kept> {
        let plain = self.rules.iter().filter(|(line, _)| line.kind == Kind::Plain);
        let mut rules: Vec<_> = plain.map(|(line, e)| (e.age, line.rule, e.expires)).collect();
        rules.sort_unstable();
        rules.into_iter().map(|(_, rule, expires)| (rule, expires)).collect()
    }

    pub fn undo(&mut self, batch: &Batch) {
        for Step { line, before, .. } in &batch.steps {
            self.set(*line, *before);
        }
    }

    /// The edits that do to the kernel what the batch did to the mirror: first
    /// the deletions in chain order, because then the walk to each is
    /// shortest, then the insertions, the newest last. `None` if that would
    /// take longer than looking at the kernel for a better way, or if there are
    /// sets, whose rules stay in front.
    pub fn edits(&self, batch: &Batch) -> Option<Vec<Edit>> {
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for Step { line, before, after } in batch.steps.iter().filter(|s| s.before != s.after) {
            gone.extend(before.map(|entry| (Reverse(entry.age), Owned::new(*line, entry.expires))));
            new.extend(after.map(|entry| (entry.age, Owned::new(*line, entry.expires))));
        }
        if gone.len() > WALKS || self.sets > 0 {
            return None;
        }
        gone.sort_unstable_by_key(|(order, _)| *order);
        new.sort_unstable_by_key(|(order, _)| *order);
        let gone = gone.into_iter().map(|(_, owned)| Edit::Delete(owned));
        Some(gone.chain(new.into_iter().map(|(_, owned)| Edit::Insert(1, owned))).collect())
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
        let touched: HashSet<Line> = batch.steps.iter().map(|step| step.line).collect();
        for chain in Chain::ALL {
            let mut above = i64::MAX;
            let mut kept = HashSet::new();
            let judge = |row: Row| {
                let stays = row.is_none_or(|owned| {
                    let age = self.place_of(&owned, &touched, law, &mut repair);
                    let in_order = age.filter(|age| *age < above);
                    above = in_order.unwrap_or(above);
                    kept.extend(in_order.map(|_| owned.line));
                    in_order.is_some()
                });
                Slot { fate: if stays { Fate::Stays } else { Fate::Gone }, row }
            };
            let rows = listing.remove(&chain).unwrap_or_default();
            let mut slots: Vec<Slot> = rows.into_iter().map(judge).collect();

            let missing =
                self.rules.iter().filter(|(l, _)| l.rule.chain() == chain && !kept.contains(l));
            let mut missing: Vec<_> = missing.map(|(line, entry)| (*line, *entry)).collect();
            missing.sort_unstable_by_key(|(_, entry)| Reverse(entry.age));
            if !missing.is_empty() {
                let rows = slots.iter().filter_map(|slot| slot.row);
                let listed: HashSet<Line> = rows.map(|owned| owned.line).collect();
                let known = |l: &Line| listed.contains(l) || touched.contains(l);
                let lost = missing.iter().map(|(line, _)| *line).filter(|line| !known(line));
                repair.notes.extend(lost.map(|line| (Note::Restored, line)));
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
        touched: &HashSet<Line>,
        law: &Law<'_>,
        repair: &mut Repair,
    ) -> Option<i64> {
        if touched.contains(&owned.line) {
            return None;
        }
        if let Some(entry) = self.rules.get(&owned.line) {
            return Some(entry.age).filter(|_| entry.expires == owned.expires);
        }
        let note = law.objection(owned).unwrap_or(Note::Removed("no request has made it"));
        repair.notes.push((note, owned.line));
        None
    }

    /// The chain as it shall be: each missing rule before the first older one;
    /// where none is left, behind the last newer one, or in front. The first rule
    /// for a set comes before everybody's.
    fn merged(&self, slots: Vec<Slot>, missing: Vec<(Line, Entry)>) -> Vec<Slot> {
        let age = |slot: &Slot| {
            let owned = slot.row.filter(|_| slot.fate == Fate::Stays)?;
            self.rules.get(&owned.line).map(|entry| entry.age)
        };
        let end = slots.iter().rposition(|slot| age(slot).is_some());
        let end = end.map_or(0, |last| last.saturating_add(1));
        let mut missing = missing.into_iter().peekable();
        let mut merged = Vec::new();
        if !slots.iter().any(|slot| age(slot) >= Some(SETS)) {
            while let Some(new) = missing.next_if(|(_, entry)| entry.age >= SETS) {
                merged.push(Slot::new(new));
            }
        }
        for (at, slot) in slots.into_iter().enumerate() {
            let older = if at == end { Some(i64::MIN) } else { age(&slot) };
            while let Some(new) = missing.next_if(|(_, m)| older.is_some_and(|a| m.age > a)) {
                merged.push(Slot::new(new));
            }
            merged.push(slot);
        }
        merged.extend(missing.map(Slot::new));
        merged
    }
}

impl Repair {
    /// Writes the edits of one chain: deletions in chain order, then
    /// insertions from the back to the front, each at its place among what is
    /// there by then.
    fn arrange(&mut self, slots: &[Slot]) {
        let mut insertions = Vec::new();
        let mut place = 1_usize;
        for slot in slots {
            match (slot.fate, &slot.row) {
                (Fate::Gone, Some(owned)) => self.edits.push(Edit::Delete(*owned)),
                (Fate::New, Some(owned)) => insertions.push(Edit::Insert(place, *owned)),
                _ => place = place.saturating_add(1),
            }
        }
        self.edits.extend(insertions.into_iter().rev());
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
            let entry = self.mirror.rules.get(&owned.line);
            let entry = entry.filter(|entry| entry.expires == owned.expires);
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
    use crate::rule::{Place, Rules};

    type Lines = &'static [&'static str];

    fn rule(path: &str) -> Rule {
        path.parse().expect(path)
    }

    /// `+PATH` is a PUT for ever, `+PATH 60` for 60 seconds, `-PATH` a DELETE.
    fn change(text: &str) -> Change {
        let (verb, rest) = text.split_at(1);
        let (path, seconds) = rest.split_once(' ').unwrap_or((rest, "0"));
        let put = Action::Put(seconds.parse().unwrap());
        let action = if verb == "+" { put } else { Action::Delete };
        Change { rules: Rules::One(rule(path)), action }
    }

    fn apply(mirror: &mut Mirror, texts: &[&str]) -> Batch {
        let changes: Vec<Change> = texts.iter().map(|text| change(text)).collect();
        mirror.apply(&changes.iter().collect::<Vec<_>>(), Family::V4, 1_000)
    }

    fn mirror(texts: &[&str]) -> Mirror {
        let mut mirror = Mirror::default();
        apply(&mut mirror, texts);
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
            let batch = apply(&mut mirror, batch);
            let said: Vec<_> =
                batch.outcomes.iter().map(|o| format!("{:?}", o.tally.single().unwrap())).collect();
            assert_eq!(
                (said.join(" ").as_str(), short(&mirror.edits(&batch).unwrap())),
                (*verdicts, expected.iter().map(|s| s.to_string()).collect()),
                "{before:?}"
            );
        }
    }

    /// The parts of `-I INPUT …` lines that vary in these tests.
    fn short(edits: &[Edit]) -> Vec<String> {
        let noise = ["INPUT", "-s", "-m", "comment", "--comment", "-j"];
        let words = |edit: &Edit| {
            edit.to_string().split(' ').filter(|w| !noise.contains(w)).collect::<Vec<_>>().join(" ")
        };
        edits.iter().map(words).collect()
    }

    #[test]
    fn what_fails_is_undone() {
        let mut mirror = mirror(&[A, "+/drop/input/any/2.2.2.2 60"]);
        let before = (mirror.rules.clone(), mirror.due(9_999));
        let batch =
            apply(&mut mirror, &["+/drop/input/any/1.1.1.1 5", "-/drop/input/any/2.2.2.2", C]);
        assert_ne!(mirror.rules, before.0);
        mirror.undo(&batch);
        assert_eq!((mirror.rules.clone(), mirror.due(9_999)), before);
    }

    #[test]
    fn a_set_clock_moves_every_expiry() {
        let mut mirror = mirror(&[A, "+/drop/input/any/2.2.2.2 60"]);
        mirror.shift(|second| moved(second, REAL_TIME, -500));
        assert_eq!(mirror.due(559), []);
        assert_eq!(mirror.due(560), [rule("/drop/input/any/2.2.2.2")]);
        // Booted in 1970, with a rule of an earlier run beside one of this run.
        mirror.add(Line::plain(rule("/drop/input/any/3.3.3.3")), Some(REAL_TIME + 60));
        mirror.shift(|second| moved(second, 100, REAL_TIME as i64));
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
                (short(&repair.edits), said.join(" ")),
                (lines.iter().map(|s| s.to_string()).collect(), told.to_string()),
                "{before:?} {kernel:?}"
            );
            // What the kernel shows then is what the mirror holds.
            let mut rows = listing(kernel).remove(&Chain::Input).unwrap_or_default();
            for line in &repair.edits {
                perform(&line.to_string(), &mut rows);
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
        assert_eq!(short(&repair.edits), ["-I 1.1.1.1 rfw DROP", "-I 2.2.2.2 rfw DROP"]);
    }

    #[test]
    fn rules_for_sets_stand_in_front() {
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        let law = Law { now: 1_000, whitelist: &whitelist };
        let mut mirror = mirror(&[A]);
        let mut batch = Batch::default();
        for target in ["drop", "accept", "reject"] {
            let place = Place::parse(&[target, "input", "eth0"]).unwrap();
            mirror.have(Line::set(place, Family::V4), Some(None), &mut batch);
        }
        mirror.add(Line::plain(rule("/drop/input/any/2.2.2.2")), None);
        let words = |edits: &[Edit]| {
            let target = |edit: &Edit| {
                let line = edit.to_string();
                format!("{} {}", line.split(' ').nth(2).unwrap(), line.rsplit(' ').next().unwrap())
            };
            edits.iter().map(target).collect::<Vec<_>>().join(", ")
        };
        // Before what is others', and the plain one where its age belongs.
        let repair = mirror.repair(listing(&["foreign", "1.1.1.1 rfw"]), &batch, &law);
        assert_eq!(words(&repair.edits), "2 DROP, -i DROP, -i REJECT, -i ACCEPT");
        assert_eq!(repair.notes.len(), 1);
        let mut rows = listing(&["foreign", "1.1.1.1 rfw"]).remove(&Chain::Input).unwrap();
        repair.edits.iter().for_each(|edit| perform(&edit.to_string(), &mut rows));
        let mut comparison = mirror.compare();
        assert!(rows.iter().all(|row| comparison.row(Chain::Input, *row)) && comparison.is_same());
        assert!(mirror.edits(&batch).is_none(), "their place must be looked up");
        mirror.undo(&batch);
        assert_eq!(mirror.sets(), []);
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
        let key = |row: &Row| row.map(|o| (o.line, o.expires));
        let same = |other: &Row| key(other) == key(&row);
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
        let batch = apply(&mut mirror, &gone);
        assert_eq!(mirror.edits(&batch), None, "worth a look at the kernel");
        let kernel: Vec<&str> = kernel.iter().map(String::as_str).collect();
        let mut rows = listing(&kernel);
        rows.get_mut(&Chain::Input).unwrap()[0].as_mut().unwrap().counters = (5, 7);
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        let law = Law { now: 1_000, whitelist: &whitelist };
        let repair = mirror.repair(rows, &batch, &law);
        assert_eq!(repair.notes, []);
        let lines = short(&repair.edits);
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
        apply(&mut mirror, &["+/accept/input/any/1.1.1.0/24"]);
        let kernel: Vec<String> = (0..99).rev().map(|n| format!("1.1.1.{n} rfw")).collect();
        let mut rows = listing(&kernel.iter().map(String::as_str).collect::<Vec<_>>());
        let accept = Owned::new(Line::plain(rule("/accept/input/any/1.1.1.0/24")), None);
        rows.get_mut(&Chain::Input).unwrap().insert(0, Some(accept));
        let batch = apply(&mut mirror, &paths);
        assert_eq!(mirror.edits(&batch), None);
        let whitelist = Whitelist::parse("9.9.9.9").unwrap();
        let law = Law { now: 1_000, whitelist: &whitelist };
        let lines = short(&mirror.repair(rows, &batch, &law).edits);
        assert_eq!(lines.len(), 2 * 100);
        assert_eq!(lines[100], "-I 1.1.1.0/24 rfw ACCEPT");
        assert_eq!(lines[199], "-I 1.1.1.98 rfw DROP");
    }
}
