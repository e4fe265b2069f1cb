//! The list: every rule that rfw keeps, with its order and its expiry. Pure: no process, no clock.
//!
//! While rfw runs, this is the truth; the kernel and the state file are made to match it. A rule
//! is kept as its [`Group`] and one address, because most rules differ only in that, and because
//! with sets each group is one set.

use super::iptables::{KernelRule, TaggedRule};
use crate::http::api_error::ApiError;
use crate::rule::net::{Family, Net};
use crate::rule::tag::Tag;
use crate::rule::{Action, Chain, Change, Filter, Match, Rule, RuleTemplate, Rules, Side};
use crate::state::{Record, StoredRule};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::mem;
use std::net::IpAddr;
use std::num::NonZeroU64;

/// The expiry of a permanent rule.
const NEVER: u64 = u64::MAX;
/// Unix seconds of 2026-01-01. No correct clock shows less.
const REAL_TIME: u64 = 1_767_225_600;
/// The maximum number of rules in one family without sets: iptables-nft takes seconds to list more.
pub const MAX_RULES: usize = 100_000;
const TOO_MANY_RULES: ApiError =
    ApiError::Full("rfw keeps at most 100,000 rules; set ipset.path in rfw.conf to keep more.");
/// The maximum number of addresses in all sets, unless one may have more: their memory, 130 MB.
const MAX_ADDRESSES: usize = 2_097_152;
const TOO_MANY_ADDRESSES: ApiError = ApiError::Full(
    "rfw keeps at most 2,097,152 addresses in sets, or ipset.maxelem if that is more.",
);
/// The maximum number of tags.
const MAX_TAGS: usize = 64;
/// The maximum number of sets: each makes every check slower.
const MAX_SETS: usize = 1_024;
/// From this number on, empty sets are destroyed.
pub const MANY_SETS: usize = MAX_SETS / 2;
const TOO_MANY_SETS: ApiError =
    ApiError::Full("rfw keeps at most 1,024 sets; delete the rules in those that are not used.");
const SAME_NAME: ApiError =
    ApiError::Full("Another set has the same name by chance; choose another tag.");
const TOO_MANY_TAGS: ApiError =
    ApiError::Full("rfw keeps at most 64 tags; delete those that are not used.");
const SET_FULL: ApiError = ApiError::SetFull("The set is full; raise ipset.maxelem in rfw.conf.");
/// How many rules expire at once: iptables-nft takes 3 to 8 s to delete them, and requests wait.
const MAX_EXPIRED: usize = 20_000;

/// The effect of a change on one rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    Inserted,
    /// It existed; it has a new expiry and precedes all older rules.
    Refreshed,
    Exists,
    Deleted,
    Absent,
}

impl Verdict {
    /// The word in responses and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Inserted => "inserted",
            Verdict::Refreshed => "refreshed",
            Verdict::Exists => "exists",
            Verdict::Deleted => "deleted",
            Verdict::Absent => "absent",
        }
    }
}

/// The number of rules of a change by verdict, without zeros.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Tally(BTreeMap<Verdict, usize>);

impl Tally {
    pub fn of(&self, verdict: Verdict) -> usize {
        self.0.get(&verdict).copied().unwrap_or(0)
    }

    /// The verdict of a single rule.
    pub fn single(&self) -> Option<Verdict> {
        self.0.keys().next().copied()
    }

    pub fn add(&mut self, verdict: Verdict, count: usize) {
        if count > 0 {
            let sum = self.0.entry(verdict).or_default();
            *sum = sum.saturating_add(count);
        }
    }
}

/// The response to a change that is in effect.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub tally: Tally,
    /// Unix seconds.
    pub expires: Option<u64>,
}

/// All parts of a rule except its first address. The order of groups is that of the rules of sets:
/// the target comes first, accept before reject before drop.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Group {
    pub template: RuleTemplate,
    pub family: Family,
    /// The destination, if the rule names two addresses or none.
    second: Option<Net>,
}

impl Group {
    /// The group of a rule, and its address there.
    pub fn of(rule: &Rule) -> (Group, Net) {
        if let Some((template, net)) = rule.template() {
            return (Group { template, family: net.family(), second: None }, net);
        }
        let (source, destination) = rule.sides();
        let template = rule.template_of(Side::Source);
        (Group { template, family: source.family(), second: Some(destination) }, source)
    }

    pub fn rule(&self, net: Net) -> Rule {
        let mut rule = self.template.rule(net);
        if let (Match::Forward { destination, .. }, Some(second)) = (&mut rule.matches, self.second)
        {
            *destination = second;
        }
        rule
    }

    /// The rule of its set; `None` if its addresses cannot be in one.
    pub fn set(&self) -> Option<KernelRule> {
        self.second.is_none().then(|| KernelRule::set(self.template, self.family))
    }
}

/// A rule of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// A greater number is newer. A newer rule precedes older ones.
    pub serial: NonZeroU64,
    /// Unix seconds, or [`NEVER`].
    expires: u64,
}

impl Entry {
    pub fn expires(&self) -> Option<u64> {
        Some(self.expires).filter(|second| *second != NEVER)
    }
}

/// The rules of one group, by address.
pub type Members = BTreeMap<Net, Entry>;

/// The members that share an address with `net`. A block sorts directly before the blocks that
/// it contains.
fn overlapping(members: &Members, net: Net) -> impl Iterator<Item = (&Net, &Entry)> {
    let wider = (0..net.prefix()).filter_map(move |prefix| Net::new(net.addr(), prefix));
    let wider = wider.filter_map(|net| members.get_key_value(&net));
    wider.chain(members.range(net..).take_while(move |(inner, _)| net.contains(inner)))
}

/// The rules of a group that a batch changed or confirmed, each with its entry before.
type Run = (Group, Vec<(Net, Option<Entry>)>);

/// The effect of changes on the list, to be written and undone.
#[derive(Default)]
pub struct Batch {
    /// Each rule once, in the order in which they were inserted.
    runs: Vec<Run>,
    /// The sets that did not exist before.
    pub created: Vec<Group>,
    /// One for each change, in order.
    pub outcomes: Vec<Outcome>,
}

/// A rule before and after a batch.
#[derive(Clone, Copy)]
pub struct Difference {
    pub group: Group,
    pub net: Net,
    pub before: Option<Entry>,
    pub after: Option<Entry>,
}

impl Difference {
    pub fn rule(&self) -> Rule {
        self.group.rule(self.net)
    }
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub fn len(&self) -> usize {
        self.runs.iter().map(|(_, steps)| steps.len()).sum()
    }

    /// The groups of its rules; one may occur several times.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.runs.iter().map(|(group, _)| group)
    }

    fn push(&mut self, group: Group, steps: Vec<(Net, Option<Entry>)>) {
        if !steps.is_empty() {
            self.runs.push((group, steps));
        }
    }
}

/// Every rule that rfw keeps.
#[derive(Default)]
pub struct List {
    groups: BTreeMap<Group, Members>,
    /// The serial number of the newest rule.
    last_serial: u64,
    /// That of the newest rule of an earlier run; 0 once the clock has shown a real time.
    last_loaded: u64,
    /// No rule is due before this second; after a refresh or a deletion, perhaps none is due then.
    next_due: u64,
    /// The maximum number of addresses in a set; `None` without sets. In sets, an address has one
    /// target at a time.
    pub(super) sets: Option<usize>,
    /// Whether this host does not filter IPv6: then lists lack their IPv6 lines.
    pub(super) lacks_ipv6: bool,
}

impl List {
    pub fn new(sets: Option<usize>) -> List {
        List { sets, ..List::default() }
    }

    /// Puts or replaces a rule of an earlier run, without a record of it.
    pub fn insert(&mut self, rule: &Rule, expires: Option<u64>) {
        let (group, net) = Group::of(rule);
        let entry = self.new_entry(expires.filter(|second| *second > 0).unwrap_or(NEVER));
        self.last_loaded = self.last_serial;
        self.set(group, net, Some(entry));
    }

    /// Removes a rule, without a record of it.
    pub fn remove(&mut self, rule: &Rule) {
        let (group, net) = Group::of(rule);
        self.set(group, net, None);
    }

    /// Removes the group of an empty set.
    pub fn forget(&mut self, group: &Group) {
        self.groups.remove(group);
    }

    /// In sets, an address has one target: removes all but the newest. Returns whether it removed
    /// any, as after a switch from rules to sets. Empty sets are removed, too.
    pub fn drop_rivals(&mut self) -> bool {
        let mut older = Vec::new();
        for (group, members) in &self.groups {
            for rivals in self.rivals(*group).filter_map(|rival| self.members(&rival)) {
                let is_older = |(net, entry): &(&Net, &Entry)| {
                    rivals.get(net).is_some_and(|rival| rival.serial > entry.serial)
                };
                let nets = members.iter().filter(is_older);
                older.extend(nets.map(|(net, _)| (*group, *net)));
            }
        }
        for (group, net) in &older {
            self.set(*group, *net, None);
        }
        self.groups.retain(|_, members| !members.is_empty());
        !older.is_empty()
    }

    /// Carries out changes in order, or none of them if there is no room for one.
    /// `now` is in Unix seconds.
    pub fn apply(&mut self, changes: &[&Change], now: u64) -> Result<Batch, ApiError> {
        let mut batch = Batch::default();
        for change in changes {
            let outcome = self.carry_out(change, now, &mut batch);
            let outcome = outcome.inspect_err(|_| self.undo(&batch))?;
            batch.outcomes.push(outcome);
        }
        // Within one change no rule occurs twice, but in several it may.
        if changes.len() > 1 {
            let mut seen = HashSet::new();
            let runs = mem::take(&mut batch.runs).into_iter();
            let steps = runs.flat_map(|(group, steps)| steps.into_iter().map(move |s| (group, s)));
            let mut steps: Vec<_> =
                steps.filter(|(group, (net, _))| seen.insert((*group, *net))).collect();
            steps.sort_by_key(|(group, (net, _))| Some(self.entry(*group, net)?.serial));
            batch.runs = steps.into_iter().map(|(group, step)| (group, vec![step])).collect();
        }
        Ok(batch)
    }

    fn carry_out(
        &mut self,
        change: &Change,
        now: u64,
        batch: &mut Batch,
    ) -> Result<Outcome, ApiError> {
        let seconds = change.action.expire().filter(|seconds| *seconds > 0);
        let expires = seconds.map(|seconds| now.saturating_add(seconds));
        let mut tally = Tally::default();
        if let (Rules::List(template, nets), Action::Replace(_)) = (&change.rules, change.action) {
            tally.add(Verdict::Deleted, self.delete_others(*template, nets, batch));
        }
        for (group, nets) in self.groups_of(&change.rules) {
            match change.action {
                Action::Delete => {
                    let deleted = self.delete(group, &nets, batch);
                    tally.add(Verdict::Deleted, deleted);
                    tally.add(Verdict::Absent, nets.len().saturating_sub(deleted));
                }
                Action::DeleteAnyTag => self.delete_alike(group, &nets, batch, &mut tally),
                Action::Put(_) | Action::Replace(_) => {
                    self.check_room(group, &nets)?;
                    if self.is_in_set(&group) && !self.groups.contains_key(&group) {
                        batch.created.push(group);
                    }
                    self.put(group, &nets, expires.unwrap_or(NEVER), batch, &mut tally);
                }
            }
        }
        Ok(Outcome { tally, expires })
    }

    /// Deletes the rules of a template that a list does not name.
    fn delete_others(&mut self, template: RuleTemplate, nets: &[Net], batch: &mut Batch) -> usize {
        let families: &[Family] = if self.lacks_ipv6 { &[Family::V4] } else { &Family::ALL };
        let delete = |family: &Family| {
            let group = Group { template, family: *family, second: None };
            let held = self.members(&group).into_iter().flat_map(Members::keys);
            let others = held.filter(|net| nets.binary_search(net).is_err());
            let others: Vec<Net> = others.copied().collect();
            self.delete(group, &others, batch)
        };
        families.iter().map(delete).sum()
    }

    /// Deletes addresses from all groups that differ only in their tags.
    fn delete_alike(&mut self, group: Group, nets: &[Net], batch: &mut Batch, tally: &mut Tally) {
        let is_alike = |other: &&Group| {
            let template = RuleTemplate { tag: group.template.tag, ..other.template };
            group == Group { template, ..**other }
        };
        let alike: Vec<Group> = self.groups.keys().filter(is_alike).copied().collect();
        let mut held = BTreeSet::new();
        for group in alike {
            let nets = self.held(group, nets);
            tally.add(Verdict::Deleted, self.delete(group, &nets, batch));
            held.extend(nets);
        }
        tally.add(Verdict::Absent, nets.len().saturating_sub(held.len()));
    }

    /// Which of these addresses, which are sorted, a group has. A long list is not looked up in a
    /// short group: there may be many.
    fn held(&self, group: Group, nets: &[Net]) -> Vec<Net> {
        let Some(members) = self.members(&group) else { return Vec::new() };
        if members.len() < nets.len() {
            return members.keys().filter(|net| nets.binary_search(net).is_ok()).copied().collect();
        }
        nets.iter().filter(|net| members.contains_key(net)).copied().collect()
    }

    /// The groups of the rules that a change names, each with its addresses.
    fn groups_of<'a>(&self, rules: &'a Rules) -> Vec<(Group, Cow<'a, [Net]>)> {
        match rules {
            Rules::One(rule) => {
                let (group, net) = Group::of(rule);
                vec![(group, vec![net].into())]
            }
            Rules::List(template, nets) => {
                let group = |nets: &[Net]| Group {
                    template: *template,
                    family: nets.first().map_or(Family::V4, Net::family),
                    second: None,
                };
                let families = nets.chunk_by(|a, b| a.family() == b.family());
                families.map(|nets| (group(nets), nets.into())).collect()
            }
            Rules::Tagged(tag, chain) => {
                let filter = Filter { chain: *chain, tag: Some(*tag), net: None };
                let groups = self.groups.iter();
                let named = groups.filter(|(Group { template, .. }, _)| {
                    filter.covers(template.chain, template.tag)
                });
                named.map(|(group, members)| (*group, members.keys().copied().collect())).collect()
            }
        }
    }

    /// Checks the limits before any work: a refused list must not cost memory.
    fn check_room(&self, group: Group, nets: &[Net]) -> Result<(), ApiError> {
        let (room, full) = match self.sets.filter(|_| self.is_in_set(&group)) {
            Some(maxelem) => {
                let room = maxelem.saturating_sub(self.members(&group).map_or(0, Members::len));
                let held = self.sets().map(|(.., members)| members.len()).sum();
                let rest = MAX_ADDRESSES.max(maxelem).saturating_sub(held);
                if rest < room { (rest, TOO_MANY_ADDRESSES) } else { (room, SET_FULL) }
            }
            None => (MAX_RULES.saturating_sub(self.count_rules(group.family)), TOO_MANY_RULES),
        };
        if self.members(&group).is_none_or(Members::is_empty) {
            self.check_tag(group.template.tag)?;
        }
        if !self.groups.contains_key(&group) {
            self.check_set(group)?;
        }
        let new = || nets.iter().filter(|net| self.entry(group, net).is_none()).count();
        if nets.len() <= room || new() <= room { Ok(()) } else { Err(full) }
    }

    /// Checks whether one more group with this tag is within the limit.
    fn check_tag(&self, tag: Tag) -> Result<(), ApiError> {
        let held = self.groups.iter().filter(|(_, members)| !members.is_empty());
        let mut tags: BTreeSet<Tag> = held.map(|(group, _)| group.template.tag).collect();
        tags.insert(tag);
        tags.remove(&Tag::NONE);
        if tag != Tag::NONE && tags.len() > MAX_TAGS { Err(TOO_MANY_TAGS) } else { Ok(()) }
    }

    /// Checks whether one more set is within the limits.
    fn check_set(&self, group: Group) -> Result<(), ApiError> {
        let Some(set) = group.set().filter(|_| self.sets.is_some()).map(|set| set.to_string())
        else {
            return Ok(());
        };
        if self.sets().count() >= MAX_SETS {
            return Err(TOO_MANY_SETS);
        }
        // A part of a long name is hashed, and not by a cryptographic hash.
        match self.sets().any(|(other, ..)| other.to_string() == set) {
            true => Err(SAME_NAME),
            false => Ok(()),
        }
    }

    fn put(
        &mut self,
        group: Group,
        nets: &[Net],
        expires: u64,
        batch: &mut Batch,
        tally: &mut Tally,
    ) {
        for rival in self.rivals(group) {
            self.delete(rival, nets, batch);
        }
        // One allocation, before those of the rules, so that the allocator can return all of it.
        let mut steps = Vec::with_capacity(nets.len());
        if self.members(&group).is_none_or(Members::is_empty) {
            steps.extend(nets.iter().map(|net| (*net, None)));
            // At once, because a map that grows one by one is half empty.
            let members = nets.iter().map(|net| (*net, self.new_entry(expires))).collect();
            self.groups.insert(group, members);
            self.next_due = self.next_due.min(expires);
            tally.add(Verdict::Inserted, nets.len());
            return batch.push(group, steps);
        }
        let is_repeated = |net| self.entry(group, net).is_some_and(|old| old.expires == expires);
        let others = match nets.iter().any(is_repeated) {
            true => self.shadowing(group),
            false => Vec::new(),
        };
        for net in nets {
            let before = self.entry(group, net);
            let is_same = |old: &Entry| {
                old.expires == expires && !self.is_shadowed(group.template.side, *net, old, &others)
            };
            let verdict = match before {
                None => Verdict::Inserted,
                Some(old) if is_same(&old) => Verdict::Exists,
                Some(_) => Verdict::Refreshed,
            };
            if verdict != Verdict::Exists {
                let entry = self.new_entry(expires);
                self.set(group, *net, Some(entry));
            }
            steps.push((*net, before));
            tally.add(verdict, 1);
        }
        batch.push(group, steps);
    }

    /// Deletes rules of one group. Returns how many of them existed.
    fn delete(&mut self, group: Group, nets: &[Net], batch: &mut Batch) -> usize {
        if !self.groups.contains_key(&group) {
            return 0;
        }
        let steps = nets.iter().filter_map(|net| Some((*net, Some(self.set(group, *net, None)?))));
        let steps: Vec<_> = steps.collect();
        let count = steps.len();
        batch.push(group, steps);
        count
    }

    /// Removes the rules of a family that are due, [`MAX_EXPIRED`] at a time, the newest first: iptables
    /// finds these soonest.
    pub fn expire(&mut self, family: Family, now: u64) -> Batch {
        let mut batch = Batch::default();
        if self.next_due > now {
            return batch;
        }
        let rules = self.members_of(|group| group.family == family);
        let rules = rules.filter(|(.., entry)| entry.expires <= now);
        // There may be millions of addresses in sets, whose order does not matter.
        let most = if self.sets.is_some() { MAX_EXPIRED } else { MAX_RULES };
        let mut rules: Vec<_> = rules.take(most).collect();
        rules.sort_unstable_by_key(|(.., entry)| Reverse(entry.serial));
        rules.truncate(MAX_EXPIRED);
        let mut due: BTreeMap<Group, Vec<Net>> = BTreeMap::new();
        rules.into_iter().for_each(|(group, net, _)| due.entry(*group).or_default().push(*net));
        for (group, nets) in due {
            self.delete(group, &nets, &mut batch);
        }
        self.next_due = self.first_expiry();
        batch
    }

    pub fn undo(&mut self, batch: &Batch) {
        for (group, steps) in batch.runs.iter().rev() {
            for (net, before) in steps {
                self.set(*group, *net, *before);
            }
        }
        batch.created.iter().for_each(|group| self.forget(group));
    }

    /// Moves every expiry after the wall clock, which showed `before`, was set by this number of
    /// seconds. Until it has shown a real time, as on a router that has just booted, an expiry in
    /// real time is correct if it is from an earlier run.
    pub fn shift(&mut self, before: u64, seconds: i64) {
        if before >= REAL_TIME {
            self.last_loaded = 0;
        }
        for entry in self.groups.values_mut().flat_map(Members::values_mut) {
            let moves = entry.serial.get() > self.last_loaded || entry.expires < REAL_TIME;
            if moves && entry.expires != NEVER {
                entry.expires = entry.expires.saturating_add_signed(seconds).max(1);
            }
        }
        self.next_due = self.first_expiry();
    }

    fn first_expiry(&self) -> u64 {
        self.members_of(|_| true).map(|(.., entry)| entry.expires).min().unwrap_or(NEVER)
    }

    /// The rules of some groups that a batch changed or confirmed.
    pub fn differences(
        &self,
        batch: &Batch,
        is_wanted: impl Fn(&Group) -> bool + Clone,
    ) -> impl Iterator<Item = Difference> + Clone {
        let runs = batch.runs.iter().filter(move |(group, _)| is_wanted(group));
        runs.flat_map(move |(group, steps)| {
            let group = *group;
            steps.iter().map(move |(net, before)| Difference {
                group,
                net: *net,
                before: *before,
                after: self.entry(group, net),
            })
        })
    }

    /// Whether the set of another target has an address.
    pub fn is_elsewhere(&self, group: Group, net: &Net) -> bool {
        self.rivals(group).any(|rival| self.entry(rival, net).is_some())
    }

    /// The changes of a batch for the state file, the newest last.
    pub fn records(&self, batch: &Batch) -> impl Iterator<Item = Record> + Clone {
        let changed = self.differences(batch, |_| true).filter(|d| d.before != d.after);
        changed.map(|difference| match difference.after {
            Some(entry) => Record::Put(difference.rule(), entry.expires()),
            None => Record::Delete(difference.rule()),
        })
    }

    /// Every rule, the oldest first.
    pub fn stored(&self) -> impl Iterator<Item = StoredRule> {
        let mut rules: Vec<_> = self.members_of(|_| true).collect();
        rules.sort_by_cached_key(|(.., entry)| entry.serial);
        rules.into_iter().map(|(group, net, entry)| (group.rule(*net), entry.expires()))
    }

    /// The rules of a chain that are not kept in sets, the newest first.
    pub fn rules(&self, family: Family, chain: Chain) -> impl Iterator<Item = TaggedRule> {
        let rules = self.members_of(|group| {
            (group.family, group.template.chain) == (family, chain) && !self.is_in_set(group)
        });
        let mut rules: Vec<_> = rules.collect();
        rules.sort_unstable_by_key(|(.., entry)| Reverse(entry.serial));
        rules.into_iter().map(|(group, net, entry)| {
            TaggedRule::new(KernelRule::plain(group.rule(*net)), entry.expires())
        })
    }

    /// The groups that are kept in sets, each with the rule of its set, in the order of the rules.
    pub fn sets(&self) -> impl Iterator<Item = (KernelRule, &Group, &Members)> {
        let groups = self.groups.iter().take_while(|_| self.sets.is_some());
        groups.filter_map(|(group, members)| Some((group.set()?, group, members)))
    }

    /// The maximum number of addresses in a set; 0 without sets.
    pub fn maxelem(&self) -> usize {
        self.sets.unwrap_or_default()
    }

    pub fn is_in_set(&self, group: &Group) -> bool {
        self.sets.is_some() && group.second.is_none()
    }

    pub fn members(&self, group: &Group) -> Option<&Members> {
        self.groups.get(group)
    }

    /// The addresses in a template's sets that share one with `net`.
    pub fn overlapping(
        &self,
        template: RuleTemplate,
        net: Net,
    ) -> impl Iterator<Item = (Net, Entry)> {
        let group = Group { template, family: net.family(), second: None };
        let members = self.groups.get(&group).into_iter();
        members.flat_map(move |members| overlapping(members, net)).map(|(net, e)| (*net, *e))
    }

    /// Whether `-D` might delete a rule of the list instead of one of these.
    pub fn has_twin(&self, deleted: &[TaggedRule]) -> bool {
        let addrs = deleted.iter().map(|tagged| Group::of(&tagged.rule.rule).1.addr());
        let addrs: BTreeSet<IpAddr> = addrs.collect();
        let (Some(first), Some(last)) = (addrs.first(), addrs.last()) else { return false };
        let rules: HashMap<_, _> = deleted.iter().map(|t| (t.deletion_key(), t.rule)).collect();
        let groups = self.groups.iter().filter(|(group, _)| !self.is_in_set(group));
        let mut near = groups.flat_map(|(group, members)| {
            let near = members.range(..=Net::host(*last)).rev();
            let near = near.take_while(|(net, _)| net.addr() >= *first);
            let near = near.filter(|(net, _)| addrs.contains(&net.addr()));
            near.map(|(net, e)| TaggedRule::new(KernelRule::plain(group.rule(*net)), e.expires()))
        });
        let is_twin = |other: TaggedRule| {
            rules.get(&other.deletion_key()).is_some_and(|deleted| *deleted != other.rule)
        };
        near.any(is_twin)
    }

    pub fn contains(&self, rule: &Rule) -> bool {
        let (group, net) = Group::of(rule);
        self.entry(group, &net).is_some()
    }

    /// The members of the groups that are wanted.
    pub fn members_of(
        &self,
        is_wanted: impl Fn(&Group) -> bool,
    ) -> impl Iterator<Item = (&Group, &Net, &Entry)> {
        let groups = self.groups.iter().filter(move |(group, _)| is_wanted(group));
        groups.flat_map(|(group, members)| {
            members.iter().map(move |(net, entry)| (group, net, entry))
        })
    }

    /// The number of all rules.
    pub fn count(&self) -> usize {
        self.groups.values().map(Members::len).sum()
    }

    /// The number of rules of a family that are not kept in sets.
    pub fn count_rules(&self, family: Family) -> usize {
        let groups = self.groups.iter();
        let rules = groups.filter(|(group, _)| group.family == family && !self.is_in_set(group));
        rules.map(|(_, members)| members.len()).sum()
    }

    /// The number of rules of each group.
    pub fn counts(&self) -> impl Iterator<Item = (&Group, usize)> {
        self.groups.iter().map(|(group, members)| (group, members.len()))
    }

    fn entry(&self, group: Group, net: &Net) -> Option<Entry> {
        self.groups.get(&group)?.get(net).copied()
    }

    fn new_entry(&mut self, expires: u64) -> Entry {
        self.last_serial = self.last_serial.saturating_add(1);
        Entry { serial: NonZeroU64::new(self.last_serial).unwrap_or(NonZeroU64::MIN), expires }
    }

    /// The groups that must not hold an address that this one receives.
    fn rivals(&self, group: Group) -> impl Iterator<Item = Group> + use<> {
        let is_in_set = self.is_in_set(&group);
        let others = group.template.others().filter(move |_| is_in_set);
        others.map(move |template| Group { template, ..group })
    }

    /// Sets or removes a rule and returns the previous entry.
    fn set(&mut self, group: Group, net: Net, entry: Option<Entry>) -> Option<Entry> {
        if let Some(entry) = entry {
            self.next_due = self.next_due.min(entry.expires);
            return self.groups.entry(group).or_default().insert(net, entry);
        }
        let members = self.groups.get_mut(&group)?;
        let old = members.remove(&net);
        // An empty set stays until there are many sets.
        if members.is_empty() && !self.is_in_set(&group) {
            self.groups.remove(&group);
        }
        old
    }

    /// The groups that may shadow rules of this one, those with another target in its chain, each
    /// with the serial number of its newest rule; the newest first.
    fn shadowing(&self, group: Group) -> Vec<(Group, NonZeroU64)> {
        let is_shadowing = |other: &Group| {
            let same = (other.family, other.template.chain) == (group.family, group.template.chain);
            same && other.template.target != group.template.target && !self.is_in_set(&group)
        };
        let others = self.groups.iter().filter(|(other, _)| is_shadowing(other));
        let newest = |members: &Members| members.values().map(|entry| entry.serial).max();
        let others = others.filter_map(|(other, members)| Some((*other, newest(members)?)));
        let mut others: Vec<_> = others.collect();
        others.sort_unstable_by_key(|(_, newest)| Reverse(*newest));
        others
    }

    /// Whether a newer rule of these groups may match some of the same packets. Rules with two
    /// addresses are not compared one by one, which would take too long: at worst, a rule moves to
    /// the front once more.
    fn is_shadowed(
        &self,
        side: Side,
        net: Net,
        entry: &Entry,
        others: &[(Group, NonZeroU64)],
    ) -> bool {
        let newer = others.iter().take_while(|(_, newest)| *newest > entry.serial);
        let mut newer = newer.filter_map(|(other, _)| Some((other, self.members(other)?)));
        newer.any(|(other, members)| {
            let is_comparable = other.template.side == side && other.second.is_none();
            !is_comparable
                || overlapping(members, net).any(|(_, rival)| rival.serial > entry.serial)
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::iter;
    use std::net::Ipv4Addr;
    use std::time::{Duration, Instant};

    const NOW: u64 = 2_000_000_000;

    type Lines = &'static [&'static str];

    fn rule(path: &str) -> Rule {
        path.parse().expect(path)
    }

    /// `+PATH` is a permanent PUT, `+PATH 60` expires in 60 seconds, `=PATH` also replaces, `-PATH`
    /// is a DELETE, `!PATH` one whatever the tag. A path that ends in `/{A,B}`, or `/{A,B}@TAG`, is
    /// a list. `-@TAG` and `-@TAG INPUT` delete all rules with a tag.
    fn change(text: &str) -> Change {
        let (verb, rest) = text.split_at(1);
        if let Some(rest) = rest.strip_prefix('@') {
            let (tag, chain) = rest.split_once(' ').unwrap_or((rest, ""));
            let rules = Rules::Tagged(Tag::parse(tag).unwrap(), Chain::parse(chain));
            return Change { rules, action: Action::Delete };
        }
        let (path, seconds) = rest.split_once(' ').unwrap_or((rest, "0"));
        let seconds = seconds.parse().unwrap();
        let action = match verb {
            "+" => Action::Put(seconds),
            "=" => Action::Replace(seconds),
            "!" => Action::DeleteAnyTag,
            _ => Action::Delete,
        };
        let Some((template, nets)) = path.split_once("/{") else {
            return Change { rules: Rules::One(rule(path)), action };
        };
        let (nets, tag) = Tag::split(nets).unwrap();
        let segments: Vec<&str> = template.split('/').skip(1).collect();
        let template = RuleTemplate { tag, ..RuleTemplate::parse(&segments).unwrap() };
        let nets = nets.trim_end_matches('}').split(',').map(|net| Net::parse(net).unwrap());
        let nets: BTreeSet<Net> = nets.collect();
        Change { rules: Rules::List(template, nets.into_iter().collect()), action }
    }

    fn apply(list: &mut List, texts: &[&str]) -> Batch {
        let changes: Vec<Change> = texts.iter().map(|text| change(text)).collect();
        list.apply(&changes.iter().collect::<Vec<_>>(), NOW).unwrap()
    }

    fn list(sets: bool, texts: &[&str]) -> List {
        let mut list = List::new(sets.then_some(65_536));
        for text in texts {
            apply(&mut list, &[text]);
        }
        list
    }

    /// As in [`change`].
    fn show((rule, expires): StoredRule) -> String {
        expires.map_or(format!("+{rule}"), |second| format!("+{rule} {}", second - NOW))
    }

    /// The oldest first.
    fn stored(list: &List) -> Vec<String> {
        list.stored().map(show).collect()
    }

    fn records(list: &List, batch: &Batch) -> Vec<String> {
        let show = |record| match record {
            Record::Put(rule, expires) => show((rule, expires)),
            Record::Delete(rule) => format!("-{rule}"),
        };
        list.records(batch).map(show).collect()
    }

    /// The verdicts of each change, with their counts unless they are 1.
    fn verdicts(batch: &Batch) -> String {
        let count = |(verdict, count): (&Verdict, &usize)| match count {
            1 => verdict.name().to_string(),
            _ => format!("{} {count}", verdict.name()),
        };
        let one = |Outcome { tally, .. }: &Outcome| {
            tally.0.iter().map(count).collect::<Vec<_>>().join("+")
        };
        batch.outcomes.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    fn content(list: &List) -> BTreeMap<Group, Members> {
        list.groups.clone()
    }

    /// Checks the invariants.
    fn check(list: &List) {
        let mut serials = HashSet::new();
        for (group, members) in &list.groups {
            assert!(!members.is_empty() || list.is_in_set(group), "{group:?}");
            assert_eq!(list.members(group), Some(members));
            for (net, entry) in members {
                assert!(list.next_due <= entry.expires);
                let serial = entry.serial;
                assert!(serials.insert(serial) && serial.get() <= list.last_serial);
                assert_eq!(Group::of(&group.rule(*net)), (*group, *net));
                for rival in list.rivals(*group) {
                    assert_eq!(list.entry(rival, net), None, "one target at a time");
                }
            }
        }
    }

    /// A feed that is sent again lacks its IPv6 lines if the host has lost IPv6.
    #[test]
    fn replace_without_ipv6() {
        let mut list = list(false, &["+/drop/input/any/{1.1.1.1,2.2.2.2,2001:db8::1}@a"]);
        list.lacks_ipv6 = true;
        let batch = apply(&mut list, &["=/drop/input/any/{1.1.1.1}@a"]);
        assert_eq!(verdicts(&batch), "exists+deleted");
        let left = ["+/drop/input/any/1.1.1.1@a", "+/drop/input/any/2001:db8::1@a"];
        assert_eq!(stored(&list), left);
    }

    /// Applies a batch, and checks its records for the state file and `undo`.
    fn apply_and_check(list: &mut List, texts: &[&str]) -> Batch {
        let mut replayed = List::new(list.sets);
        list.stored().for_each(|(rule, expires)| replayed.insert(&rule, expires));
        let before = content(list);
        let batch = apply(list, texts);
        check(list);
        for record in list.records(&batch) {
            match record {
                Record::Put(rule, expires) => replayed.insert(&rule, expires),
                Record::Delete(rule) => replayed.remove(&rule),
            }
        }
        check(&replayed);
        assert_eq!(stored(&replayed), stored(list), "{texts:?}");
        list.undo(&batch);
        check(list);
        assert_eq!(content(list), before, "{texts:?}");
        apply(list, texts)
    }

    const A: &str = "+/drop/input/any/1.1.1.1";
    const B: &str = "+/drop/input/any/2.2.2.2";
    const C: &str = "+/drop/input/any/3.3.3.3";
    const A60: &str = "+/drop/input/any/1.1.1.1 60";
    const NO_A: &str = "-/drop/input/any/1.1.1.1";
    const NO_B: &str = "-/drop/input/any/2.2.2.2";
    const ACCEPT_A: &str = "+/accept/input/any/1.1.1.1";
    const NO_ACCEPT_A: &str = "-/accept/input/any/1.1.1.1";

    #[test]
    fn batches() {
        const LIST: &str = "+/drop/input/any/{3.3.3.3,1.1.1.1,2.2.2.2,1.1.1.1}";
        // The list, the batch, the verdicts, the records
        let table: &[(Lines, Lines, &str, Lines)] = &[
            (&[], &[], "", &[]),
            (&[], &[A], "inserted", &[A]),
            (&[], &[A60], "inserted", &[A60]),
            (&[A], &[A], "exists", &[]),
            (&[A60], &[A60], "exists", &[]),
            (&[A], &[A60], "refreshed", &[A60]),
            (&[A60], &[A], "refreshed", &[A]),
            (&[A], &[NO_A], "deleted", &[NO_A]),
            (&[], &[NO_A], "absent", &[]),
            (&[B], &[NO_A], "absent", &[]),
            // Several changes of one rule
            (&[], &[A, A], "inserted, exists", &[A]),
            (&[], &[A, NO_A], "inserted, deleted", &[]),
            (&[A], &[NO_A, A], "deleted, inserted", &[A]),
            (&[A], &[NO_A, A, NO_A], "deleted, inserted, deleted", &[NO_A]),
            (&[A, B], &[A60, B, A], "refreshed, exists, refreshed", &[A]),
            // Deletions first, then the newest last
            (&[A, B], &[C, NO_B, A60], "inserted, deleted, refreshed", &[NO_B, C, A60]),
            (&[], &[A, B, A60], "inserted, inserted, refreshed", &[B, A60]),
            // Lists
            (&[B], &[LIST], "inserted 2+exists", &[A, C]),
            (&[B], &["-/drop/input/any/{1.1.1.1,2.2.2.2}"], "deleted+absent", &[NO_B]),
            (
                &[],
                &["+/drop/input/any/{1.1.1.1,2001:db8::/64} 60"],
                "inserted 2",
                &[A60, "+/drop/input/any/2001:db8::/64 60"],
            ),
            (
                &[],
                &["+/drop/output/eth0/{1.1.1.1}", A],
                "inserted, inserted",
                &["+/drop/output/eth0/1.1.1.1", A],
            ),
        ];
        for (before, texts, expected, expected_records) in table {
            for sets in [false, true] {
                let mut list = list(sets, before);
                let batch = apply_and_check(&mut list, texts);
                let records = records(&list, &batch);
                assert_eq!(verdicts(&batch), *expected, "{sets} {before:?} {texts:?}");
                assert_eq!(records, *expected_records, "{sets} {before:?} {texts:?}");
            }
        }
    }

    /// A newer rule with another target matches some of the same packets, so a PUT must move the
    /// older one before it.
    #[test]
    fn what_is_shadowed_is_refreshed() {
        // The two rules, the older one first; whether a PUT of the older one moves it
        let table = [
            ("/drop/input/any/1.1.1.1", "/accept/input/any/1.1.1.1", true),
            ("/drop/input/any/1.1.1.1", "/reject/input/any/1.1.1.0/24", true),
            ("/drop/input/any/1.1.1.0/24", "/accept/input/any/1.1.1.1", true),
            ("/drop/input/any/1.1.1.0/24", "/accept/input/any/1.1.1.255", true),
            ("/drop/input/any/1.1.1.1", "/accept/input/eth0/1.1.0.0/16", true),
            ("/drop/input/any/2001:db8::1", "/accept/input/any/2001:db8::/32", true),
            ("/drop/input/any/1.1.1.1", "/drop/input/eth0/1.1.1.0/24", false),
            ("/drop/input/any/1.1.1.1", "/accept/input/any/1.1.1.2", false),
            ("/drop/input/any/1.1.1.0/24", "/accept/input/any/1.1.2.0/24", false),
            ("/drop/input/any/1.1.2.0/24", "/accept/input/any/1.1.1.0/24", false),
            ("/drop/input/any/1.1.1.1", "/accept/output/any/1.1.1.1", false),
            ("/drop/input/any/1.1.1.1", "/accept/forward/any/1.1.1.1", false),
            // Two addresses, or none
            ("/drop/forward/any/1.1.1.1", "/accept/forward/any/0.0.0.0", true),
            ("/drop/forward/any/0.0.0.0", "/accept/forward/any/1.1.1.1", true),
            ("/drop/forward/any/1.1.1.1", "/accept/forward/any/0.0.0.0/any/2.2.2.2", true),
            ("/drop/forward/any/0.0.0.0/any/2.2.2.2", "/accept/forward/any/1.1.1.1", true),
            ("/drop/forward/any/1.1.1.1", "/accept/forward/any/1.1.1.1/any/2.2.2.2", true),
            (
                "/drop/forward/any/1.1.1.1/any/2.2.2.2",
                "/accept/forward/any/1.1.1.1/any/2.2.2.0/24",
                true,
            ),
            (
                "/drop/forward/any/1.1.1.1/any/2.2.2.2",
                "/reject/forward/any/1.1.1.1/any/3.3.3.3",
                true, // the second addresses are not compared
            ),
            ("/drop/forward/any/3.3.3.3/any/2.2.2.2", "/drop/forward/any/3.3.3.3", false),
            ("/drop/forward/any/::", "/accept/forward/any/0.0.0.0", false),
        ];
        for (older, newer, is_shadowed) in table {
            let (older, newer) = (format!("+{older}"), format!("+{newer}"));
            let mut list = list(false, &[&older, &newer]);
            let verdict = |is_shadowed| if is_shadowed { "refreshed" } else { "exists" };
            let batch = apply_and_check(&mut list, &[&newer]);
            assert_eq!(verdicts(&batch), "exists", "{newer}");
            let batch = apply_and_check(&mut list, &[&older]);
            assert_eq!(verdicts(&batch), verdict(is_shadowed), "{older} {newer}");
            let expected = if is_shadowed { [newer, older] } else { [older, newer] };
            assert_eq!(stored(&list), expected);
        }
    }

    #[test]
    fn an_address_in_sets_has_one_target() {
        let table: &[(Lines, Lines, &str, Lines)] = &[
            (&[A], &[ACCEPT_A], "inserted", &[NO_A, ACCEPT_A]),
            (&[A60], &[ACCEPT_A], "inserted", &[NO_A, ACCEPT_A]),
            (&[A], &[ACCEPT_A, A], "inserted, inserted", &[A]),
            (&[], &[ACCEPT_A, A], "inserted, inserted", &[A]),
            (
                &[A, B],
                &["+/reject/input/any/{1.1.1.1,2.2.2.2}"],
                "inserted 2",
                &[NO_A, NO_B, "+/reject/input/any/1.1.1.1", "+/reject/input/any/2.2.2.2"],
            ),
            (&[ACCEPT_A], &[NO_A], "absent", &[]),
            (&[ACCEPT_A], &[A, NO_A], "inserted, deleted", &[NO_ACCEPT_A]),
            // Another interface, block or chain is another address; the order does not matter
            (&[A], &["+/accept/input/eth0/1.1.1.1"], "inserted", &["+/accept/input/eth0/1.1.1.1"]),
            (
                &[A],
                &["+/accept/input/any/1.1.1.0/24"],
                "inserted",
                &["+/accept/input/any/1.1.1.0/24"],
            ),
            (&[A, "+/accept/input/any/1.1.1.0/24"], &[A], "exists", &[]),
            (
                &["+/drop/forward/any/1.1.1.1"],
                &["+/accept/forward/any/0.0.0.0/any/1.1.1.1"],
                "inserted",
                &["+/accept/forward/any/0.0.0.0/any/1.1.1.1"],
            ),
            // Rules with two addresses or none are not in sets
            (
                &["+/drop/forward/any/1.1.1.1/any/2.2.2.2", "+/accept/forward/any/0.0.0.0"],
                &["+/accept/forward/any/1.1.1.1/any/2.2.2.2"],
                "inserted",
                &["+/accept/forward/any/1.1.1.1/any/2.2.2.2"],
            ),
            (
                &["+/drop/forward/any/0.0.0.0", "+/accept/forward/any/0.0.0.0"],
                &["+/drop/forward/any/0.0.0.0"],
                "refreshed",
                &["+/drop/forward/any/0.0.0.0"],
            ),
        ];
        for (before, texts, expected, expected_records) in table {
            let mut list = list(true, before);
            let batch = apply_and_check(&mut list, texts);
            let records = records(&list, &batch);
            assert_eq!(verdicts(&batch), *expected, "{before:?} {texts:?}");
            assert_eq!(records, *expected_records, "{before:?} {texts:?}");
        }
    }

    #[test]
    fn outcomes_contain_the_expiry() {
        let batch = apply(&mut List::new(None), &[A60, NO_A, B]);
        let expiries: Vec<_> = batch.outcomes.iter().map(|outcome| outcome.expires).collect();
        assert_eq!(expiries, [Some(NOW + 60), None, None]);
        let single: Vec<_> = batch.outcomes.iter().map(|outcome| outcome.tally.single()).collect();
        let [inserted, deleted] = [Some(Verdict::Inserted), Some(Verdict::Deleted)];
        assert_eq!(single, [inserted, deleted, inserted]);
        assert_eq!(Tally::default().single(), None);
    }

    /// A group that a batch empties and fills again is not one that it created.
    #[test]
    fn undo_of_a_rule_that_is_deleted_and_put_again() {
        for sets in [false, true] {
            let mut list = list(sets, &[A60]);
            let batch = apply(&mut list, &[NO_A, A]);
            list.undo(&batch);
            assert_eq!(stored(&list), [A60]);
            check(&list);
        }
    }

    #[test]
    fn created_sets() {
        let mut list = list(true, &[A, NO_A]);
        let pair = "+/drop/forward/any/1.1.1.1/any/2.2.2.2";
        let batch = apply(&mut list, &[B, ACCEPT_A, "+/accept/input/any/2.2.2.2", pair]);
        let names = |groups: &[Group]| {
            let name = |group: &Group| Some(group.set()?.to_string());
            groups.iter().filter_map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(&batch.created), ["rfw4:accept:in:any"]);
        let groups: BTreeSet<Group> = batch.groups().copied().collect();
        assert_eq!(
            names(&groups.into_iter().collect::<Vec<_>>()),
            ["rfw4:accept:in:any", "rfw4:drop:in:any"]
        );
        assert_eq!((batch.len(), batch.is_empty()), (4, false));
        assert_eq!(list.sets().count(), 2);
        list.undo(&batch);
        assert_eq!(list.sets().count(), 1, "an empty set stays, a new one does not");
        list.drop_rivals();
        assert_eq!(list.sets().count(), 0);
        let targets =
            ["drop", "reject", "accept"].map(|t| format!("+/{t}/input/any/{{1.1.1.1,::1}}"));
        let names: Vec<String> = self::list(true, &targets.each_ref().map(String::as_str))
            .sets()
            .map(|(rule, ..)| rule.to_string())
            .collect();
        assert_eq!(
            names,
            [
                "rfw4:accept:in:any",
                "rfw6:accept:in:any",
                "rfw4:reject:in:any",
                "rfw6:reject:in:any",
                "rfw4:drop:in:any",
                "rfw6:drop:in:any"
            ]
        );
        // Without sets there are none.
        let list = self::list(false, &[A]);
        assert_eq!((list.sets().count(), list.sets), (0, None));
    }

    #[test]
    fn expiry() {
        for sets in [false, true] {
            let (b90, c5) = ("+/drop/output/any/2.2.2.2 90", "+/drop/input/any/3.3.3.3 5");
            let mut list = list(sets, &[A60, b90, c5, "+/drop/input/any/4.4.4.4"]);
            // Refreshed, deleted, and put again
            apply(&mut list, &["+/drop/input/any/1.1.1.1 70", "-/drop/input/any/3.3.3.3"]);
            apply(&mut list, &["+/drop/input/any/3.3.3.3 60"]);
            let due = |list: &mut List, second| {
                let before = content(list);
                let batch = list.expire(Family::V4, NOW + second);
                check(list);
                let records = records(list, &batch);
                list.undo(&batch);
                check(list);
                assert_eq!(content(list), before, "at {second}");
                list.expire(Family::V4, NOW + second);
                records.join(" ")
            };
            assert_eq!(due(&mut list, 4), "");
            assert!(list.expire(Family::V4, NOW + 4).is_empty());
            assert_eq!(due(&mut list, 59), "");
            assert_eq!(due(&mut list, 60), "-/drop/input/any/3.3.3.3");
            assert_eq!(due(&mut list, 60), "");
            assert_eq!(due(&mut list, 69), "");
            assert_eq!(due(&mut list, 90), "-/drop/input/any/1.1.1.1 -/drop/output/any/2.2.2.2");
            assert_eq!(due(&mut list, NEVER - NOW - 1), "");
            assert_eq!(stored(&list), ["+/drop/input/any/4.4.4.4"]);
        }
    }

    #[test]
    fn many_rules_expire_in_parts() {
        let mut list = List::new(None);
        let nets = (0..).map(|number: u32| Net::host(Ipv4Addr::from(number).into()));
        for net in nets.skip(1).take(2 * MAX_EXPIRED + 1) {
            list.insert(&rule(&format!("/drop/input/any/{net}")), Some(NOW + 60));
        }
        let oldest = rule("/drop/input/any/0.0.0.1");
        let mut expire = |second| {
            let batch = list.expire(Family::V4, NOW + second);
            check(&list);
            (batch.len(), list.contains(&oldest))
        };
        let counts = [59, 60, 60, 61, 61].map(&mut expire);
        let expected =
            [(0, true), (MAX_EXPIRED, true), (MAX_EXPIRED, true), (1, false), (0, false)];
        assert_eq!(counts, expected);
    }

    #[test]
    fn a_set_clock_moves_every_expiry() {
        let expiries = |list: &List| -> Vec<Option<u64>> {
            list.stored().map(|(_, expires)| expires).collect()
        };
        let mut list = List::new(None);
        // As a person may write it in the comment of a rule: 0 means never, as in a request.
        list.insert(&rule("/drop/input/any/1.1.1.1"), Some(0));
        list.insert(&rule("/drop/input/any/2.2.2.2"), Some(NOW + 60));
        list.shift(NOW, -500);
        assert_eq!(expiries(&list), [None, Some(NOW - 440)]);
        list.shift(NOW - 500, 500);
        assert_eq!(expiries(&list), [None, Some(NOW + 60)]);
        assert_eq!(list.next_due, NOW + 60, "not searched before");
        check(&list);
        // A rule that moves into the past is due, but not permanent.
        list.shift(NOW, -3_000_000_000);
        assert_eq!(expiries(&list), [None, Some(1)]);
        check(&list);
        // Booted in 1970, with rules of an earlier run in 1970 and in real time, and one of this run.
        let mut list = List::new(None);
        list.insert(&rule("/drop/input/any/1.1.1.1"), Some(REAL_TIME - 1));
        list.insert(&rule("/drop/input/any/2.2.2.2"), Some(160));
        list.insert(&rule("/drop/input/any/3.3.3.3"), Some(REAL_TIME));
        list.apply(&[&change(&format!("+/drop/input/any/4.4.4.4 {REAL_TIME}"))], 100).unwrap();
        list.shift(100, 1_000);
        let after = |seconds| Some(REAL_TIME + seconds);
        assert_eq!(expiries(&list), [after(999), Some(1_160), after(0), after(1_100)]);
        check(&list);
        // From then on, all of them are in real time, even if it is set back for a while.
        list.shift(REAL_TIME, -10);
        list.shift(REAL_TIME - 10, 20);
        assert_eq!(expiries(&list), [after(1_009), Some(1_170), after(10), after(1_110)]);
        check(&list);
    }

    #[test]
    fn each_source_has_its_own_rules() {
        const DROP: &str = "+/drop/input/any/1.1.1.1";
        const DROP_A: &str = "+/drop/input/any/1.1.1.1@a";
        const DROP_B: &str = "+/drop/input/any/1.1.1.1@b";
        const OTHER_A: &str = "+/drop/input/any/2.2.2.2@a";
        const V6_A: &str = "+/drop/input/any/::1@a";
        const ACCEPT_A: &str = "+/accept/input/any/1.1.1.1@a";
        const OUTPUT_A: &str = "+/drop/output/any/1.1.1.1@a";
        // The list, the changes, the counts of the last change, and the list afterwards.
        let table: [(Lines, Lines, &str, Lines); 13] = [
            (&[DROP], &[DROP_A], "inserted", &[DROP, DROP_A]),
            (&[DROP, DROP_A], &["-/drop/input/any/1.1.1.1@a"], "deleted", &[DROP]),
            (&[DROP, DROP_A], &["-/drop/input/any/1.1.1.1"], "deleted", &[DROP_A]),
            (&[DROP], &["-/drop/input/any/1.1.1.1@a"], "absent", &[DROP]),
            (
                &[DROP, DROP_A, DROP_B, OTHER_A],
                &["!/drop/input/any/1.1.1.1"],
                "deleted 3",
                &[OTHER_A],
            ),
            (&[OTHER_A], &["!/drop/input/any/1.1.1.1"], "absent", &[OTHER_A]),
            (
                &[DROP, DROP_B, OTHER_A, V6_A],
                &["!/drop/input/any/{1.1.1.1,2.2.2.2,3.3.3.3}"],
                "deleted 3+absent",
                &[V6_A],
            ),
            (
                &[DROP, DROP_A, V6_A, OUTPUT_A],
                &["=/drop/input/any/{2.2.2.2}@a"],
                "inserted+deleted 2",
                &[DROP, OUTPUT_A, OTHER_A],
            ),
            (&[DROP_A, OTHER_A], &["=/drop/input/any/{2.2.2.2}@a"], "exists+deleted", &[OTHER_A]),
            (&[DROP, DROP_A, V6_A, OUTPUT_A, DROP_B], &["-@a"], "deleted 3", &[DROP, DROP_B]),
            (&[DROP_A, V6_A, OUTPUT_A], &["-@a INPUT"], "deleted 2", &[OUTPUT_A]),
            (&[DROP], &["-@a"], "", &[DROP]),
            (&[DROP_A], &["-@a", ACCEPT_A], "inserted", &[ACCEPT_A]),
        ];
        for sets in [false, true] {
            for (before, changes, counts, after) in table {
                let mut list = list(sets, before);
                let batch = apply_and_check(&mut list, changes);
                let last =
                    Batch { outcomes: vec![batch.outcomes.last().unwrap().clone()], ..batch };
                assert_eq!(verdicts(&last), counts, "{changes:?}");
                assert_eq!(stored(&list), after, "{changes:?}");
            }
        }
        // In a set, an address has one target for each tag.
        let mut list = list(true, &[DROP, DROP_A]);
        apply_and_check(&mut list, &[ACCEPT_A]);
        assert_eq!(stored(&list), [DROP, ACCEPT_A]);
    }

    /// Each address of a list was compared with each rule of another kind, which took 20 s for 45,000
    /// of both.
    #[test]
    fn a_list_is_not_compared_with_each_rule_of_another_kind() {
        let nets: Vec<Net> =
            (1..=20_000_u32).map(|n| Net::host(Ipv4Addr::from(n).into())).collect();
        let mut list = List::new(None);
        for (net, second) in
            nets.iter().flat_map(|net| [(net, Net::parse("9.9.9.9").unwrap()), (net, *net)])
        {
            list.insert(&rule(&format!("/accept/forward/any/{net}/any/{second}")), None);
        }
        let template = RuleTemplate::parse(&["drop", "forward", "any"]).unwrap();
        let put = Change { rules: Rules::List(template, nets), action: Action::Put(0) };
        assert!(list.apply(&[&put], NOW).is_ok());
        let started = Instant::now();
        assert_eq!(verdicts(&list.apply(&[&put], NOW).unwrap()), "exists 20000");
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    }

    /// A group with fewer addresses is looked up in the list, any other the other way around.
    #[test]
    fn long_and_short_lists_are_deleted_whatever_the_tag() {
        for (count, verdict) in [(3, "deleted 3+absent"), (300, "deleted 4+absent 297")] {
            let puts =
                ["+/drop/input/any/{0.0.0.1,0.0.0.2,0.0.1.1}@a", "+/drop/input/any/0.0.0.2@b"];
            let mut list = list(true, &puts);
            let nets = (1..=count).map(|n: u32| Net::host(Ipv4Addr::from(n).into())).collect();
            let template = RuleTemplate::parse(&["drop", "input", "any"]).unwrap();
            let rules = Rules::List(template, nets);
            let delete = Change { rules, action: Action::DeleteAnyTag };
            let batch = list.apply(&[&delete], NOW).unwrap();
            assert_eq!(verdicts(&batch), verdict, "{count}");
        }
    }

    #[test]
    fn at_most_64_tags() {
        let mut list = List::new(None);
        let put = |n: usize| change(&format!("+/drop/input/any/1.1.1.1@t{n}"));
        for n in 0..MAX_TAGS {
            assert!(list.apply(&[&put(n)], NOW).is_ok(), "{n}");
        }
        assert_eq!(list.apply(&[&put(MAX_TAGS)], NOW).err(), Some(TOO_MANY_TAGS));
        for text in ["+/drop/input/any/1.1.1.1", "+/drop/output/any/1.1.1.1@t1", "-@t2"] {
            assert!(list.apply(&[&change(text)], NOW).is_ok(), "{text}");
        }
        assert!(list.apply(&[&put(MAX_TAGS)], NOW).is_ok());
        // An empty set stays, its tag does not.
        let mut list = List::new(Some(65_536));
        for n in 0..2 * MAX_TAGS {
            let delete = change(&format!("-/drop/input/any/1.1.1.1@t{n}"));
            assert!(list.apply(&[&put(n), &delete], NOW).is_ok(), "{n}");
        }
        for n in 0..MAX_TAGS {
            assert!(list.apply(&[&put(n)], NOW).is_ok(), "{n}");
        }
        assert_eq!(list.apply(&[&put(MAX_TAGS)], NOW).err(), Some(TOO_MANY_TAGS));
    }

    #[test]
    fn at_most_1024_sets_and_none_with_the_name_of_another() {
        let mut list = List::new(Some(65_536));
        for n in 0..MAX_SETS {
            let put = change(&format!("+/drop/input/eth{n}/1.1.1.1"));
            assert!(list.apply(&[&put], NOW).is_ok(), "{n}");
        }
        let refused = |list: &mut List, text: &str| list.apply(&[&change(text)], NOW).err();
        assert_eq!(refused(&mut list, "+/drop/input/any/1.1.1.1"), Some(TOO_MANY_SETS));
        assert_eq!(refused(&mut list, "+/drop/forward/any/1.1.1.1/any/2.2.2.2"), None);
        assert_eq!(refused(&mut list, "+/drop/input/eth7/1.1.1.2"), None);
        // Both names end in ~4a7c0d7d3a6389.
        let (one, two) = (
            "+/drop/forward/any/1.1.1.1@crowdsec",
            "+/drop/forward/xjhyoswz0/9.9.9.9/6bvXNP3Fh-0/0.0.0.0@evil",
        );
        let mut list = List::new(Some(65_536));
        assert_eq!(refused(&mut list, one), None);
        assert_eq!(refused(&mut list, two), Some(SAME_NAME));
        assert_eq!((stored(&list), refused(&mut list, one)), (vec![one.to_string()], None));
        let mut list = List::new(None);
        assert_eq!((refused(&mut list, one), refused(&mut list, two)), (None, None));
    }

    /// With a set for each interface name, one user could exhaust the memory, and so could every start.
    #[test]
    fn the_addresses_in_all_sets_are_limited() {
        const HALF: usize = MAX_ADDRESSES / 2;
        let nets: Vec<Net> =
            (1..=HALF as u32).map(|n| Net::host(Ipv4Addr::from(n).into())).collect();
        let mut list = List::new(Some(HALF));
        for chain in ["input", "output"] {
            let template = RuleTemplate::parse(&["drop", chain, "any"]).unwrap();
            let put = Change { rules: Rules::List(template, nets.clone()), action: Action::Put(0) };
            assert!(list.apply(&[&put], NOW).is_ok());
        }
        let mut apply = |text: &str| list.apply(&[&change(text)], NOW).err();
        assert_eq!(apply("+/drop/input/eth0/9.9.9.9"), Some(TOO_MANY_ADDRESSES));
        assert_eq!(apply("+/drop/input/any/9.9.9.9"), Some(SET_FULL));
        assert_eq!(apply("-/drop/input/any/0.0.0.1"), None);
        // This one is not in a set.
        assert_eq!(apply("+/drop/forward/eth0/9.9.9.9/any/8.8.8.8"), None);
        assert_eq!(apply("+/drop/input/eth0/9.9.9.9"), None);
        // Unless one set may have more.
        list.sets = Some(2 * MAX_ADDRESSES);
        assert_eq!(list.apply(&[&change("+/drop/input/eth0/9.9.9.8")], NOW).err(), None);
    }

    #[test]
    fn what_has_no_room_changes_nothing() {
        // The maximum size of a set, the list, the changes, and whether there is room for them.
        let table: [(usize, Lines, Lines, bool); 9] = [
            (1, &[], &["+/drop/input/any/1.1.1.1"], true),
            (0, &[], &["+/drop/input/any/1.1.1.1"], false),
            (1, &["+/drop/input/any/1.1.1.1"], &["+/drop/input/any/1.1.1.1 60"], true),
            (1, &["+/drop/input/any/1.1.1.1"], &["+/drop/input/any/2.2.2.2"], false),
            (1, &["+/drop/input/any/1.1.1.1"], &["+/drop/input/any/::1"], true),
            (1, &["+/drop/input/any/1.1.1.1"], &["+/accept/input/any/1.1.1.1"], true),
            (0, &[], &["+/drop/forward/any/1.1.1.1/any/2.2.2.2"], true),
            (
                1,
                &["+/drop/input/any/1.1.1.1"],
                &["-/drop/input/any/1.1.1.1", "+/drop/input/any/2.2.2.2"],
                true,
            ),
            (2, &[], &["+/drop/input/any/{1.1.1.1,1.1.1.2,::1,::2,::3}"], false),
        ];
        for (maxelem, before, changes, fits) in table {
            let mut list = list(true, before);
            list.sets = Some(maxelem);
            let old = stored(&list);
            let changes: Vec<Change> = changes.iter().map(|text| change(text)).collect();
            let changes: Vec<&Change> = changes.iter().collect();
            assert_eq!(list.apply(&changes, NOW).is_ok(), fits, "{changes:?}");
            assert_eq!(stored(&list) == old, !fits, "{changes:?}");
            check(&list);
        }
        let nets = |count: u32| (0..count).map(|n| Net::host(Ipv4Addr::from(n).into())).collect();
        let template = RuleTemplate::parse(&["drop", "input", "any"]).unwrap();
        let put = |nets| Change { rules: Rules::List(template, nets), action: Action::Put(0) };
        let mut list = List::new(None);
        let room = list.apply(&[&put(nets(100_001))], NOW).map(|_| ());
        assert_eq!((room, list.count()), (Err(TOO_MANY_RULES), 0));
        assert!(list.apply(&[&put(nets(100_000))], NOW).is_ok());
        assert!(list.apply(&[&put(nets(1))], NOW).is_ok());
        assert!(list.apply(&[&change("+/drop/output/any/255.1.1.1")], NOW).is_err());
        assert!(list.apply(&[&change("+/drop/output/any/::1")], NOW).is_ok());
    }

    /// iptables may compare neither the lengths of prefixes nor interfaces.
    #[test]
    fn twins() {
        let rules = ["+/drop/input/eth0/1.1.1.1", "+/drop/input/any/2001:db8::/64 60"];
        let table = [
            ("/drop/input/eth1/1.1.1.1", None, true),
            ("/drop/input/eth0/1.1.1.1", None, false),
            ("/drop/input/eth1/1.1.1.1@a", None, false),
            ("/drop/output/eth1/1.1.1.1", None, false),
            ("/reject/input/eth1/1.1.1.1", None, false),
            ("/drop/input/any/2001:db8::/48", Some(NOW + 60), true),
            ("/drop/input/any/2001:db8::/48", Some(NOW + 61), false),
            ("/drop/input/any/2001:db9::/48", Some(NOW + 60), false),
        ];
        for (path, expires, expected) in table {
            let deleted = TaggedRule::new(KernelRule::plain(rule(path)), expires);
            let others = ["/drop/input/any/0.1.1.1", "/drop/input/any/255.1.1.1"];
            let [a, b] = others.map(|path| TaggedRule::new(KernelRule::plain(rule(path)), None));
            for deleted in [vec![deleted], vec![deleted, a], vec![b, deleted], vec![a, b, deleted]]
            {
                assert_eq!(list(false, &rules).has_twin(&deleted), expected, "{path}");
                assert!(!list(true, &rules).has_twin(&deleted), "{path} in a set");
            }
        }
    }

    #[test]
    fn overlapping_blocks() {
        let nets = ["0.0.0.0/0", "1.0.0.0/9", "1.1.1.0/24", "1.1.1.1", "1.1.1.2", "1.1.2.0/24"];
        let mut members = Members::default();
        let entry = Entry { serial: NonZeroU64::MIN, expires: NEVER };
        for net in nets.iter().chain(&["2001:db8::/32", "2001:db8::1"]) {
            members.insert(Net::parse(net).unwrap(), entry);
        }
        let table = [
            ("1.1.1.1", "0.0.0.0/0 1.0.0.0/9 1.1.1.0/24 1.1.1.1"),
            ("1.1.1.3", "0.0.0.0/0 1.0.0.0/9 1.1.1.0/24"),
            ("1.1.1.0/24", "0.0.0.0/0 1.0.0.0/9 1.1.1.0/24 1.1.1.1 1.1.1.2"),
            ("1.1.0.0/16", "0.0.0.0/0 1.0.0.0/9 1.1.1.0/24 1.1.1.1 1.1.1.2 1.1.2.0/24"),
            ("9.9.9.9", "0.0.0.0/0"),
            ("2001:db8::1", "2001:db8::/32 2001:db8::1"),
            ("2001:db8::/16", "2001:db8::/32 2001:db8::1"),
            ("2001:db9::1", ""),
        ];
        for (net, expected) in table {
            let found = overlapping(&members, Net::parse(net).unwrap());
            let found: Vec<String> = found.map(|(net, _)| net.to_string()).collect();
            assert_eq!(found.join(" "), expected, "{net}");
        }
    }

    #[test]
    fn rules_of_a_chain_newest_first() {
        let texts = [
            A60,
            "+/drop/forward/any/1.1.1.1",
            "+/accept/input/eth0/2.2.2.0/24",
            "+/accept/forward/any/1.1.1.1/any/2.2.2.2 60",
            "+/drop/input/any/::1",
            "+/reject/forward/eth0/0.0.0.0",
            "+/drop/output/any/1.1.1.1",
            B,
        ];
        let rules = |sets, family, chain| {
            let list = list(sets, &texts);
            let shown = list.rules(family, chain).map(|tagged| {
                assert_eq!(
                    (tagged.counters, tagged.rule),
                    (None, KernelRule::plain(tagged.rule.rule))
                );
                show((tagged.rule.rule, tagged.expires))
            });
            shown.collect::<Vec<String>>()
        };
        assert_eq!(rules(false, Family::V4, Chain::Input), [texts[7], texts[2], texts[0]]);
        assert_eq!(rules(false, Family::V6, Chain::Input), [texts[4]]);
        assert_eq!(rules(false, Family::V4, Chain::Forward), [texts[5], texts[3], texts[1]]);
        assert_eq!(rules(true, Family::V4, Chain::Forward), [texts[5], texts[3]]);
        assert_eq!(rules(true, Family::V4, Chain::Input), [""; 0]);
        let list = list(true, &texts);
        assert_eq!(list.count(), 8);
        assert_eq!((list.count_rules(Family::V4), list.count_rules(Family::V6)), (2, 0));
        assert_eq!(list.counts().map(|(_, count)| count).sum::<usize>(), 8);
        assert_eq!(self::list(false, &texts).count_rules(Family::V4), 7);
    }

    #[test]
    fn a_large_list_is_compacted_and_keeps_its_content() {
        const MANY: usize = 4_096;
        let nets = |range: std::ops::Range<usize>| -> String {
            let nets = range.map(|n| format!("10.0.{}.{}", n / 256, n % 256));
            format!("/drop/input/any/{{{}}}", nets.collect::<Vec<_>>().join(","))
        };
        for sets in [false, true] {
            let mut list = list(sets, &[A60]);
            let large = format!("+{} 9", nets(0..MANY + 1));
            let batch = apply_and_check(&mut list, &[&large]);
            assert_eq!(verdicts(&batch), format!("inserted {}", MANY + 1));
            assert_eq!((list.count(), stored(&list)[0].as_str()), (MANY + 2, A60));
            let batch = apply_and_check(&mut list, &[&format!("-{}", nets(1..MANY + 1))]);
            assert_eq!(verdicts(&batch), format!("deleted {MANY}"));
            assert_eq!(stored(&list), [A60, "+/drop/input/any/10.0.0.0 9"]);
        }
    }

    /// Pseudorandom numbers.
    pub fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move |below| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as usize % below
        }
    }

    /// After any changes, the list equals a simple model: a vector of rules, the oldest first.
    #[test]
    fn the_list_equals_a_plain_vector() {
        let addresses = [
            "input/any/1.1.1.1",
            "input/any/1.1.1.0/24",
            "input/eth0/1.1.1.1",
            "forward/any/1.1.1.1",
            "forward/any/1.1.1.1/any/2.2.2.2",
            "forward/any/0.0.0.0",
            "input/any/::1",
        ];
        for seed in 0..200 {
            let mut below = numbers(seed);
            let sets = seed % 2 == 0;
            let (mut list, mut model) =
                (List::new(sets.then_some(65_536)), Vec::<StoredRule>::new());
            let mut now = NOW;
            for _ in 0..30 {
                let text = |below: &mut dyn FnMut(usize) -> usize| {
                    let target = ["drop", "accept", "reject"][below(3)];
                    let tag = ["", "", "@a", "@b"][below(4)];
                    let path = format!("/{target}/{}{tag}", addresses[below(addresses.len())]);
                    let verb = ["+", "+", "+", "+", "-", "-", "!"][below(7)];
                    verb.to_string() + &path + ["", " 5", " 9"][below(3)]
                };
                let texts: Vec<String> =
                    iter::repeat_with(|| text(&mut below)).take(1 + seed as usize % 3).collect();
                let changes: Vec<Change> = texts.iter().map(|text| change(text)).collect();
                let before = (content(&list), model.clone());
                let batch = list.apply(&changes.iter().collect::<Vec<_>>(), now).unwrap();
                let verdicts: Vec<_> =
                    changes.iter().map(|c| follow(&mut model, c, sets, now)).collect();
                let actual = batch.outcomes.iter().map(|outcome| outcome.tally.single().unwrap());
                assert_eq!(actual.collect::<Vec<_>>(), verdicts, "{seed} {texts:?}");
                assert_eq!(list.stored().collect::<Vec<_>>(), model, "{seed} {texts:?}");
                check(&list);
                if below(3) == 0 {
                    list.undo(&batch);
                    assert_eq!(content(&list), before.0, "{seed} {texts:?}");
                    model = before.1;
                }
                now += below(3) as u64;
                if below(3) == 0 {
                    Family::ALL.iter().for_each(|family| drop(list.expire(*family, now)));
                    model.retain(|(_, expires)| expires.is_none_or(|second| second > now));
                    assert_eq!(list.stored().collect::<Vec<_>>(), model, "{seed} at {now}");
                    check(&list);
                }
            }
        }
    }

    /// Whether a newer rule shadows an older one, as far as the list compares them.
    pub fn may_shadow(newer: &Rule, older: &Rule) -> bool {
        let is_about = |rule: &Rule| (rule.chain(), rule.family());
        let is_exact = newer
            .template()
            .is_some_and(|(template, _)| template.side == Group::of(older).0.template.side);
        newer.target != older.target
            && is_about(newer) == is_about(older)
            && (!is_exact || newer.overlaps(older))
    }

    fn follow(model: &mut Vec<StoredRule>, change: &Change, sets: bool, now: u64) -> Verdict {
        let Rules::One(rule) = &change.rules else { unreachable!() };
        let at = model.iter().position(|(other, _)| other == rule);
        if change.action == Action::DeleteAnyTag {
            let count = model.len();
            model.retain(|(other, _)| *rule != Rule { tag: rule.tag, ..*other });
            return if model.len() < count { Verdict::Deleted } else { Verdict::Absent };
        }
        let Action::Put(seconds) = change.action else {
            at.map(|at| model.remove(at));
            return if at.is_some() { Verdict::Deleted } else { Verdict::Absent };
        };
        let is_in_set = sets && rule.template().is_some();
        let expires = (seconds > 0).then_some(now + seconds);
        if let Some(at) = at {
            let is_shadowed =
                !is_in_set && model[at + 1..].iter().any(|(newer, _)| may_shadow(newer, rule));
            if model[at].1 == expires && !is_shadowed {
                return Verdict::Exists;
            }
        }
        let same = |other: &Rule| *other == Rule { target: other.target, ..*rule };
        model.retain(|(other, _)| other != rule && !(is_in_set && same(other)));
        model.push((*rule, expires));
        if at.is_some() { Verdict::Refreshed } else { Verdict::Inserted }
    }
}
