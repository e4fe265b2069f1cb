//! The only way to repair: reads the rules and sets of a family, compares them with the list, and
//! rewrites what differs. The goals are those of the [`super::engine`].

use super::engine::{Engine, Kernel, Settings};
use super::ipset::{SetEdit, SetHeader, replacement_name};
use super::iptables::{KernelRule, RuleEdit, TaggedRule};
use super::list::{Batch, Entry, Group, Members};
use super::process::ToolError;
use super::reconcile::{Listing, Plan, is_right, plan};
use super::sets;
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, Target};
use std::collections::HashSet;
use std::iter;
use std::time::Instant;

/// How many times a listing is read until it agrees with the previous one.
const MAX_READS: usize = 5;

/// When rfw began to read a set, and each of its addresses with its timeout; `None` if the set does
/// not exist.
type SetListing = (Instant, Option<Vec<(Net, u32)>>);

/// Addresses that have moved to another set, by the name of the set that they must still leave.
pub type Moved = Vec<(String, Vec<Net>)>;

impl<K: Kernel> Engine<K> {
    /// Reads the rules of a family, unless `listing` shows them, and makes them match the list
    /// (goals 3 and 4). With `is_pending`, they lack what the batch in progress changes. If they are
    /// distrusted, so are the sets. These come first, because a rule cannot name a set that does not
    /// exist; what has moved to another set leaves the old one last, unless there is no room.
    pub fn check_rules(
        &mut self,
        family: Family,
        listing: Option<Listing>,
        batch: Option<&Batch>,
        is_pending: bool,
    ) -> Result<(), ToolError> {
        let is_distrusted = self.distrusted.contains(&family);
        let mut moved = Moved::new();
        if is_distrusted && self.list.sets.is_some() {
            moved = self.repair_sets(family, batch)?;
        }
        let listing = listing.map_or_else(|| self.read_rules(family), Ok)?;
        // One incomplete listing could hide what a failed batch left.
        if !is_distrusted {
            if let Some(batch) = batch.filter(|_| is_pending) {
                let plans = self.plans(family, &listing);
                if self.are_expected(&plans, family, batch) {
                    return self.rewrite_rules(family, plans, Some(batch));
                }
            } else if self.is_right(family, &listing) {
                self.count_traffic(family, &listing);
                return Ok(());
            }
            // A check may leave foreign rules in front for a while; a request may not.
            let may_wait = batch.is_none() && self.is_overtaken_often(family);
            let may_stay = |plan: &Plan| plan.edits.is_empty() || plan.is_only_overtaken();
            if may_wait && self.plans(family, &listing).iter().all(may_stay) {
                return Ok(());
            }
        }
        let listing = self.confirmed_rules(family, listing)?;
        self.rewrite_rules(family, self.plans(family, &listing), batch)?;
        self.delete_moved(family, &moved)
    }

    fn rewrite_rules(
        &mut self,
        family: Family,
        mut plans: Vec<Plan>,
        batch: Option<&Batch>,
    ) -> Result<(), ToolError> {
        let mut edits = Vec::new();
        plans.iter_mut().for_each(|plan| edits.append(&mut plan.edits));
        let later = plans.iter().filter(|plan| plan.deletes_later);
        edits.extend(later.flat_map(|plan| plan.unknown.iter().copied().map(RuleEdit::Delete)));
        // If this fails, the kernel may lack a set, too.
        self.distrusted.insert(family);
        self.write_rules(family, &edits)?;
        self.distrusted.remove(&family);
        self.has_repaired |= batch.is_none() && !edits.is_empty();
        self.report_rules(family, plans, batch);
        Ok(())
    }

    /// Whether as many rules are missing and unknown as a batch inserts and deletes.
    fn are_expected(&self, plans: &[Plan], family: Family, batch: &Batch) -> bool {
        let created = batch.created.iter().filter(|group| group.family == family).count();
        let rules = self.rule_differences(batch, family);
        let inserted = rules.clone().filter(|d| d.before.is_none() && d.after.is_some()).count();
        let deleted = rules.filter(|d| d.before.is_some() && d.after.is_none()).count();
        let missing: usize = plans.iter().map(|plan| plan.missing.len()).sum();
        let unknown: usize = plans.iter().map(|plan| plan.unknown.len()).sum();
        missing == created.saturating_add(inserted) && unknown == deleted
    }

    /// Repairs the rules of a distrusted family, as far as possible: one rule that the kernel rejects
    /// fails all. So missing rules of sets that ipset does not list, or that have another type, are left
    /// out, and then all but the guards. Rules of sets that block and are not in the list stay.
    pub(super) fn repair_rules(&mut self, family: Family) -> Result<(), ToolError> {
        let headers = self.list.sets.map(|_| self.kernel.read_headers(self.limit(0)));
        // If ipset fails altogether, the sets may well exist.
        let headers = headers.and_then(Result::ok);
        let names: Option<HashSet<String>> = headers.map(|headers| {
            let usable = headers.into_iter().filter(|header| header.is_compatible);
            usable.map(|header| header.name).collect()
        });
        let lacks_set = |rule: &KernelRule| {
            let name = rule.template().map(|_| rule.to_string());
            name.zip(names.as_ref()).is_some_and(|(name, names)| !names.contains(&name))
        };
        let mut repaired = self.rewrite_except(family, lacks_set);
        if matches!(repaired, Err(ToolError::Rejected(_))) {
            repaired = self.rewrite_except(family, |rule| !rule.is_guard());
        }
        self.distrusted.insert(family);
        repaired
    }

    fn rewrite_except(
        &mut self,
        family: Family,
        is_left: impl Fn(&KernelRule) -> bool,
    ) -> Result<(), ToolError> {
        let listing = self.confirmed_rules(family, self.read_rules(family)?)?;
        let mut plans = self.plans(family, &listing);
        for plan in &mut plans {
            let mut left: HashSet<_> = plan.missing.extract_if(.., |rule| is_left(rule)).collect();
            // An address that a refused change moved may still be blocked by such a set only.
            let blocks = |tagged: &mut TaggedRule| {
                let template = tagged.rule.template();
                template.is_some_and(|template| template.target != Target::Accept)
            };
            left.extend(plan.unknown.extract_if(.., blocks).map(|tagged| tagged.rule));
            plan.edits.retain(|edit| !left.contains(&edit.tagged().rule));
        }
        // A rule that is left out is no reason to move the others.
        let may_wait = self.is_overtaken_often(family);
        plans.retain(|plan| !may_wait || !plan.is_only_overtaken());
        self.rewrite_rules(family, plans, None)
    }

    /// Whether the kernel holds what it should.
    pub(super) fn is_right(&self, family: Family, listing: &Listing) -> bool {
        let mut chains = listing.0.iter().zip(Chain::ALL);
        chains.all(|(listing, chain)| is_right(listing, self.wanted(family, chain)))
    }

    fn plans(&self, family: Family, listing: &Listing) -> Vec<Plan> {
        let wanted = |chain| self.wanted(family, chain).collect::<Vec<_>>();
        let chains = listing.0.iter().zip(Chain::ALL);
        chains.map(|(listing, chain)| plan(listing, &wanted(chain))).collect()
    }

    /// All rfw rules that a chain should hold, in order.
    pub(super) fn wanted(&self, family: Family, chain: Chain) -> impl Iterator<Item = TaggedRule> {
        self.front(family, chain).chain(self.list.rules(family, chain))
    }

    pub fn read_rules(&self, family: Family) -> Result<Listing, ToolError> {
        self.kernel.read_rules(family, self.rules_limit(family, 0))
    }

    /// In one transaction if possible; many deletions that no insertion follows are divided. If nothing is
    /// inserted, ACCEPT rules go first: one must not outlast a newer rule that blocks some of its addresses.
    pub fn write_rules(&self, family: Family, edits: &[RuleEdit]) -> Result<(), ToolError> {
        let Settings { max_edits, max_deletions, .. } = self.settings;
        let last = |is_one: fn(&RuleEdit) -> bool| edits.iter().rposition(is_one);
        let last_insertion = last(|edit| matches!(edit, RuleEdit::Insert(..)));
        let last_whole = last_insertion
            .or_else(|| last(|edit| edit.tagged().rule.rule.target == Target::Accept))
            .filter(|_| edits.len() > max_deletions);
        let (whole, deleted) = edits.split_at(last_whole.map_or(0, |last| last.saturating_add(1)));
        let parts = whole.chunks(max_edits).chain(deleted.chunks(max_edits.min(max_deletions)));
        for edits in parts {
            self.kernel.write_rules(family, edits, self.rules_limit(family, edits.len()))?;
        }
        Ok(())
    }

    /// Reads until two consecutive listings agree; `first` was read before.
    pub fn confirmed_rules(&self, family: Family, first: Listing) -> Result<Listing, ToolError> {
        let read = || self.read_rules(family);
        read_until_agreed(first, read, Listing::agrees_with, "iptables lists other rules")
    }

    /// Reads the sets of a family and makes them match the list (goals 3 and 4), except what has moved.
    /// One that fails does not keep the others from being repaired.
    pub fn repair_sets(
        &mut self,
        family: Family,
        batch: Option<&Batch>,
    ) -> Result<Moved, ToolError> {
        let headers = self.kernel.read_headers(self.limit(0))?;
        let groups: Vec<Group> = self.sets(family).map(|(_, group, _)| *group).collect();
        let (mut missing, mut unknown, mut result) = (0_usize, 0_usize, Ok(()));
        let mut moved = Moved::new();
        for group in groups {
            if result.is_ok() || self.has_time() {
                let repaired = self.repair_set(&headers, group, &mut moved);
                let (added, deleted) = *repaired.as_ref().unwrap_or(&(0, 0));
                missing = missing.saturating_add(added);
                unknown = unknown.saturating_add(deleted);
                result = result.and(repaired.map(|_| ()));
            }
        }
        self.has_repaired |= missing.max(unknown) > 0;
        let changed = batch.map_or(0, Batch::len);
        self.report_restored(missing.saturating_sub(changed));
        self.report_removed(unknown.saturating_sub(changed));
        result.map(|()| moved)
    }

    /// Deletes what has moved: for a moment, an address is in both sets rather than in neither.
    pub fn delete_moved(&mut self, family: Family, moved: &Moved) -> Result<(), ToolError> {
        let mut edits = moved.iter().flat_map(|(name, nets)| {
            nets.iter().map(move |net| SetEdit::Delete { name, net: *net })
        });
        let limit = self.limit(moved.iter().map(|(_, nets)| nets.len()).sum());
        let written = self.kernel.write_sets(&mut edits, limit);
        written.inspect_err(|_| {
            self.distrusted.insert(family);
        })
    }

    /// Returns how many addresses the set lacked, and how many it had that are not in the list.
    fn repair_set(
        &mut self,
        headers: &[SetHeader],
        group: Group,
        moved: &mut Moved,
    ) -> Result<(usize, usize), ToolError> {
        let (Some(rule), Some(members)) = (group.set(), self.list.members(&group)) else {
            return Ok((0, 0));
        };
        let name = rule.to_string();
        // The time is that of the listing: to read a large set takes seconds.
        let planned = |(_, actual): &SetListing| {
            let has_moved = |net: &Net| self.list.is_elsewhere(group, net);
            let (maxelem, now) = (self.list.maxelem(), self.seconds());
            Some(sets::plan(&name, members, actual.as_ref()?, maxelem, has_moved, now))
        };
        // ipset reports a set that does not exist; an incomplete listing merely lacks it.
        let first = self.read_set(&name)?;
        let mut plan = planned(&first);
        // A distrusted set is read twice, for the same reason as in `check_rules`.
        let is_right = plan.as_ref().is_none_or(|plan| plan.edits.is_empty());
        if self.distrusted.contains(&group.family) || !is_right {
            plan = planned(&self.confirmed_set(&name, first)?);
        }
        let header = headers.iter().find(|header| header.name == name);
        let (missing, unknown, written) = match (plan, header) {
            (Some(_), None) => {
                return Err(ToolError::Transient("ipset lists other sets each time.".into()));
            }
            (Some(plan), Some(header)) if self.is_usable(header, members) => {
                let limit = self.limit(plan.edits.len());
                let written = self.kernel.write_sets(&mut plan.edits.into_iter(), limit);
                moved.push((name.clone(), plan.moved));
                (plan.missing, plan.unknown, written)
            }
            (plan, _) => {
                let missing = plan.as_ref().map_or(members.len(), |plan| plan.missing);
                (missing, 0, self.make_set(&name, &group, members, plan.is_some()))
            }
        };
        if written.is_err() {
            self.distrusted.insert(group.family);
        }
        written.map(|()| (missing, unknown))
    }

    pub(super) fn sets(
        &self,
        family: Family,
    ) -> impl Iterator<Item = (KernelRule, &Group, &Members)> {
        self.list.sets().filter(move |(_, group, _)| group.family == family)
    }

    /// The state file may hold more addresses than `maxelem`, if that was reduced.
    fn is_usable(&self, header: &SetHeader, members: &Members) -> bool {
        let maxelem = self.list.maxelem();
        header.is_compatible
            && header.maxelem >= members.len()
            && (header.maxelem == maxelem || members.len() > maxelem)
    }

    /// Creates a set with its addresses. If one of that name is in use, the new one is completed
    /// before it replaces that.
    fn make_set(
        &self,
        name: &str,
        group: &Group,
        members: &Members,
        exists: bool,
    ) -> Result<(), ToolError> {
        let now = self.seconds();
        let replaces = exists && self.write_set(SetEdit::Destroy(name)).is_err();
        let replacement = replacement_name(name);
        let new = if replaces { &replacement } else { name };
        if replaces {
            let _ = self.write_set(SetEdit::Destroy(new));
        }
        let (family, entries) = (group.family, members.len());
        let maxelem = self.list.maxelem();
        let create = [SetEdit::Create { name: new, family, entries, maxelem }, SetEdit::Flush(new)];
        let add = |(net, entry): (&Net, &Entry)| sets::edit(new, *net, Some(*entry), now);
        let swap = replaces.then_some(SetEdit::Swap(new, name));
        let mut edits = create.into_iter().chain(members.iter().map(add)).chain(swap);
        let written = self.kernel.write_sets(&mut edits, self.limit(entries));
        if matches!(&written, Err(ToolError::Rejected(text)) if text.contains("type does not match"))
        {
            // Someone made it with another type. Without its rule, the next repair destroys it.
            let rule = group.set().map(|rule| RuleEdit::Delete(TaggedRule::new(rule, None)));
            let _ = self.write_rules(family, rule.as_slice());
        }
        if replaces {
            let _ = self.write_set(SetEdit::Destroy(new));
        }
        written
    }

    /// Makes one edit. A set that something uses cannot be destroyed; the next start tries again.
    pub fn write_set(&self, edit: SetEdit<'_>) -> Result<(), ToolError> {
        self.kernel.write_sets(&mut iter::once(edit), self.limit(0))
    }

    /// Each address of a set, with its timeout.
    pub fn read_set(&self, name: &str) -> Result<SetListing, ToolError> {
        let started = Instant::now();
        Ok((started, self.kernel.read_set(name, self.limit(self.list.count()))?))
    }

    /// The same, from two consecutive listings that agree; `first` was read before.
    pub fn confirmed_set(&self, name: &str, first: SetListing) -> Result<SetListing, ToolError> {
        let agree = |(_, later): &SetListing, (started, earlier): &SetListing| {
            sets::agree(earlier, later, started.elapsed())
        };
        read_until_agreed(first, || self.read_set(name), agree, "ipset lists other addresses")
    }
}

/// Reads until two consecutive listings agree (goal 3).
fn read_until_agreed<T>(
    mut last: T,
    read: impl Fn() -> Result<T, ToolError>,
    agree: impl Fn(&T, &T) -> bool,
    message: &str,
) -> Result<T, ToolError> {
    for _ in 1..MAX_READS {
        let listing = read()?;
        if agree(&listing, &last) {
            return Ok(listing);
        }
        last = listing;
    }
    Err(ToolError::Transient(format!("{message} each time; another program keeps changing them.")))
}
