//! What the kernel holds of rfw's, in memory, and the lines that take the
//! kernel from one state to another. Pure: no process, no clock.

use super::expiry::Expiries;
use super::kernel::{Owned, Row, Tag};
use super::{Outcome, Verdict};
use crate::rule::net::Family;
use crate::rule::whitelist::Whitelist;
use crate::rule::{Action, Chain, Change, Rule};
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

/// Deleting a rule costs iptables a walk to it. Where the walks of a batch add
/// up to more than this many times all rules of the chain, it is cheaper to
/// delete all of rfw's, which costs no walk, and to insert the others again.
const WALKS: usize = 64;

/// What the mirror knows of a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    /// Greater in rules that stand further in front.
    age: u64,
    tag: Tag,
}

/// Every rule of rfw's, both families.
#[derive(Default, Debug)]
pub struct Mirror {
    rules: HashMap<Rule, Entry>,
    expiries: Expiries,
    last: u64,
}

/// What a batch has done to the mirror, so that it can be undone.
#[derive(Default)]
pub struct Batch {
    before: HashMap<Rule, Option<Entry>>,
    /// One for each change, in order.
    pub outcomes: Vec<Outcome>,
}

/// A listing of one family, a chain each, front first.
pub type Listing = HashMap<Chain, Vec<Row>>;

/// Why a rule that the mirror does not know is deleted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Its time was over when rfw saw it.
    Expired,
    /// A guard rule of an earlier configuration.
    OldGuard,
    /// It overlaps the whitelist: as a change it would be refused.
    Whitelisted,
    /// The same rule stands elsewhere in the chain.
    Double,
}

/// What decides whether an unknown rule may stay.
pub struct Law<'a> {
    /// Unix seconds.
    pub now: u64,
    /// What no rule may touch.
    pub whitelist: &'a Whitelist,
}

/// A listing held against the mirror, row by row.
pub struct Comparison<'a> {
    mirror: &'a Mirror,
    /// How many rules are yet to come.
    left: usize,
    /// The age of the last rule in each chain.
    above: HashMap<Chain, u64>,
    same: bool,
}

impl Comparison<'_> {
    /// Takes the next row; `false` if the listing differs.
    pub fn row(&mut self, chain: Chain, row: &Row) -> bool {
        let Row::Own(owned) = row else { return true };
        let entry = self.mirror.rules.get(&owned.rule).filter(|entry| entry.tag == owned.tag);
        // Ages that only fall are of rules in order, none of them twice.
        let in_order = entry.is_some_and(|entry| {
            self.above.insert(chain, entry.age).is_none_or(|above| above > entry.age)
        });
        self.left = self.left.saturating_sub(1);
        self.same = self.same && in_order;
        self.same
    }

    /// Whether the whole listing showed what the mirror holds.
    pub fn is_same(&self) -> bool {
        self.same && self.left == 0
    }
}

/// How to make the kernel hold what the mirror says.
#[derive(Default)]
pub struct Repair {
    /// To be committed in one transaction.
    pub lines: Vec<String>,
    /// Rules that were gone and are put back.
    pub restored: Vec<Rule>,
    /// How many rules with rfw's tag it did not know, and keeps from now on.
    pub adopted: usize,
    /// Rules with rfw's tag that do not stay, and why.
    pub removed: Vec<(Rule, Reason)>,
    /// What will stand in the kernel, front first.
    layout: Vec<Owned>,
}

impl Mirror {
    /// Whether it holds a rule.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// How many rules it holds.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Takes a rule as its newest.
    pub fn add(&mut self, rule: Rule, tag: Tag) {
        self.last = self.last.saturating_add(1);
        self.set(rule, Some(Entry { age: self.last, tag }));
    }

    fn set(&mut self, rule: Rule, entry: Option<Entry>) -> Option<Entry> {
        let old = match entry {
            Some(entry) => self.rules.insert(rule, entry),
            None => self.rules.remove(&rule),
        };
        self.expiries.remove(old.and_then(|old| old.tag.expires()), rule);
        self.expiries.add(entry.and_then(|entry| entry.tag.expires()), rule);
        old
    }

    /// The rules that have expired by `now`.
    pub fn due(&self, now: u64) -> Vec<Rule> {
        self.expiries.due(now).collect()
    }

    /// Carries out changes in the mirror, one after the other.
    pub fn apply(&mut self, changes: &[Change], now: u64) -> Batch {
        let mut batch = Batch::default();
        for Change { rule, action } in changes {
            let old = self.rules.get(rule).copied();
            let (verdict, new) = match (action, old) {
                (Action::Delete, None) => (Verdict::Absent, None),
                (Action::Delete, Some(_)) => (Verdict::Deleted, None),
                (Action::Put(seconds), old) => {
                    let tag = match seconds {
                        0 => Tag::Permanent,
                        _ => Tag::Until(now.saturating_add(*seconds)),
                    };
                    self.put(rule, tag, old)
                }
            };
            if new != old {
                self.set(*rule, new);
                batch.before.entry(*rule).or_insert(old);
            }
            let expires = new.and_then(|entry| entry.tag.expires());
            batch.outcomes.push(Outcome { verdict, rule: *rule, expires });
        }
        batch
    }

    fn put(&mut self, rule: &Rule, tag: Tag, old: Option<Entry>) -> (Verdict, Option<Entry>) {
        if let Some(entry) = old.filter(|old| old.tag == tag && !self.is_shadowed(rule, old.age)) {
            return (Verdict::Exists, Some(entry));
        }
        self.last = self.last.saturating_add(1);
        let verdict = if old.is_some() { Verdict::Refreshed } else { Verdict::Inserted };
        (verdict, Some(Entry { age: self.last, tag }))
    }

    /// Whether a newer rule decides otherwise about some packet of this one.
    fn is_shadowed(&self, rule: &Rule, age: u64) -> bool {
        self.rules.iter().any(|(other, entry)| {
            entry.age > age
                && other.target != rule.target
                && !matches!(entry.tag, Tag::Guard(_))
                && other.overlaps(rule)
        })
    }

    /// Takes a batch back.
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
        let mut gone = Vec::new();
        let mut new = Vec::new();
        for (rule, old) in &batch.before {
            let now = self.rules.get(rule).copied();
            let differs = now != *old;
            gone.extend(old.filter(|_| differs).map(|entry| (entry, *rule)));
            new.extend(now.filter(|_| differs).map(|entry| (entry, *rule)));
        }
        if gone.len() > WALKS {
            return None;
        }
        gone.sort_unstable_by_key(|(entry, _)| Reverse(entry.age));
        new.sort_unstable_by_key(|(entry, _)| entry.age);
        let owned = |(Entry { tag, .. }, rule)| Owned { rule, tag, counters: (0, 0) };
        let deletions = gone.into_iter().map(|pair| owned(pair).delete_line());
        let insertions = new.into_iter().map(|pair| owned(pair).insert_line(1));
        Some(deletions.chain(insertions).collect())
    }

    /// Moves every expiry by the seconds that the wall clock was set forward
    /// or back.
    pub fn shift(&mut self, seconds: i64) {
        let timed =
            self.rules.iter().filter_map(|(rule, e)| Some((*rule, e.age, e.tag.expires()?)));
        for (rule, age, second) in timed.collect::<Vec<_>>() {
            let tag = Tag::Until(second.saturating_add_signed(seconds));
            self.set(rule, Some(Entry { age, tag }));
        }
    }

    /// Starts to compare a listing of one family, which is cheap as long as
    /// nobody else has touched rfw's rules.
    pub fn compare(&self, family: Family) -> Comparison<'_> {
        let left = self.rules.keys().filter(|rule| rule.family() == family).count();
        Comparison { mirror: self, left, above: HashMap::new(), same: true }
    }

    /// Works out how the kernel comes to hold what the mirror says. Rules with
    /// rfw's tag that it does not know are adopted, as at start, when it knows
    /// none, unless the batch deletes them.
    pub fn repair(&self, family: Family, mut listing: Listing, batch: &Batch, law: &Law) -> Repair {
        let mut repair = Repair::default();
        for chain in Chain::ALL {
            let rows = listing.remove(&chain).unwrap_or_default();
            let keep = self.judge(&rows, batch, law, &mut repair);
            let missing = self.missing(family, chain, &rows, &keep);
            let listed: HashSet<Rule> = rows.iter().filter_map(Row::rule).collect();
            let lost = missing.iter().map(|(_, rule)| *rule);
            let lost =
                lost.filter(|rule| !listed.contains(rule) && !batch.before.contains_key(rule));
            repair.restored.extend(lost);
            arrange(self.merge(rows, &keep, missing), &mut repair);
        }
        repair
    }

    /// Which rows stay, row by row. Of rows that stand twice the last one does,
    /// because a deletion takes the first.
    fn judge(&self, rows: &[Row], batch: &Batch, law: &Law, repair: &mut Repair) -> Vec<bool> {
        let mut seen = HashSet::new();
        let mut judge = |row: &Row| {
            let Row::Own(Owned { rule, tag, .. }) = row else {
                return true;
            };
            if let Some(entry) = self.rules.get(rule) {
                return entry.tag == *tag && seen.insert(*rule);
            }
            if batch.before.contains_key(rule) {
                return false;
            }
            let reason = if tag.expires().is_some_and(|second| second <= law.now) {
                Reason::Expired
            } else if matches!(tag, Tag::Guard(_)) {
                Reason::OldGuard
            } else if law.whitelist.conflict(rule).is_some() {
                Reason::Whitelisted
            } else if !seen.insert(*rule) {
                Reason::Double
            } else {
                repair.adopted = repair.adopted.saturating_add(1);
                return true;
            };
            repair.removed.push((*rule, reason));
            false
        };
        let mut keep: Vec<bool> = rows.iter().rev().map(&mut judge).collect();
        keep.reverse();
        keep
    }

    /// What the mirror holds and no row that stays shows, newest first.
    fn missing(
        &self,
        family: Family,
        chain: Chain,
        rows: &[Row],
        keep: &[bool],
    ) -> Vec<(Entry, Rule)> {
        let kept = rows.iter().zip(keep).filter(|(_, keep)| **keep);
        let kept: HashSet<Rule> = kept.filter_map(|(row, _)| row.rule()).collect();
        let here = |rule: &Rule| rule.family() == family && rule.chain() == chain;
        let missing = self.rules.iter().filter(|(rule, _)| here(rule) && !kept.contains(rule));
        let mut missing: Vec<_> = missing.map(|(rule, entry)| (*entry, *rule)).collect();
        missing.sort_unstable_by_key(|(entry, _)| Reverse(entry.age));
        missing
    }

    /// The chain as it shall be: each missing rule before the first older one.
    fn merge(&self, rows: Vec<Row>, keep: &[bool], missing: Vec<(Entry, Rule)>) -> Vec<Slot> {
        let age = |row: &Row| match row {
            Row::Own(owned) => self.rules.get(&owned.rule).map(|entry| entry.age),
            Row::Foreign => None,
        };
        let slot = |(Entry { tag, .. }, rule): (Entry, Rule)| Slot {
            fate: Fate::New,
            row: Row::Own(Owned { rule, tag, counters: (0, 0) }),
        };
        // Where no older one is left, behind the last newer one, or in front.
        let last = rows.iter().zip(keep).rposition(|(row, keep)| *keep && age(row).is_some());
        let end = last.map_or(0, |last| last.saturating_add(1));
        let mut missing = missing.into_iter().peekable();
        let mut slots = Vec::new();
        for (at, (row, keep)) in rows.into_iter().zip(keep).enumerate() {
            let older = age(&row).filter(|_| *keep);
            while missing
                .peek()
                .is_some_and(|(m, _)| at == end || older.is_some_and(|age| m.age > age))
            {
                slots.extend(missing.next().map(slot));
            }
            let fate = if *keep { Fate::Stays } else { Fate::Gone };
            slots.push(Slot { fate, row });
        }
        slots.extend(missing.map(slot));
        slots
    }

    /// Takes over what a repair has found and done. The kernel's order becomes
    /// the mirror's.
    pub fn learn(&mut self, repair: &Repair) {
        if repair.lines.is_empty() && repair.adopted == 0 {
            return;
        }
        for owned in repair.layout.iter().rev() {
            self.add(owned.rule, owned.tag);
        }
    }
}

/// What becomes of a place in a chain.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Stays,
    Gone,
    New,
}

struct Slot {
    fate: Fate,
    row: Row,
}

/// Writes the lines for one chain: deletions in chain order, then insertions
/// from the back to the front, each at its place among what is there by then.
fn arrange(mut slots: Vec<Slot>, repair: &mut Repair) {
    rewrite_if_cheaper(&mut slots);
    let mut insertions = Vec::new();
    // The place of the next slot once everything behind it is as it shall be.
    let mut place = 1_usize;
    for slot in slots {
        let Row::Own(owned) = slot.row else {
            place = place.saturating_add(1);
            continue;
        };
        match slot.fate {
            Fate::Stays => place = place.saturating_add(1),
            Fate::Gone => repair.lines.push(owned.delete_line()),
            Fate::New => insertions.push(owned.insert_line(place)),
        }
        if slot.fate != Fate::Gone {
            repair.layout.push(owned);
        }
    }
    repair.lines.extend(insertions.into_iter().rev());
}

/// Where the walks to single rules cost more, makes every rule of rfw's go and
/// come again, with its counters.
fn rewrite_if_cheaper(slots: &mut Vec<Slot>) {
    let (mut depth, mut walks) = (0_usize, 0_usize);
    for slot in slots.iter() {
        match slot.fate {
            Fate::Stays => depth = depth.saturating_add(1),
            Fate::Gone => walks = walks.saturating_add(depth),
            Fate::New => {}
        }
    }
    if walks <= depth.saturating_mul(WALKS) {
        return;
    }
    for slot in std::mem::take(slots) {
        if slot.fate == Fate::Stays && matches!(slot.row, Row::Own(_)) {
            slots.push(Slot { fate: Fate::Gone, row: slot.row });
            slots.push(Slot { fate: Fate::New, row: slot.row });
        } else {
            slots.push(slot);
        }
    }
}
