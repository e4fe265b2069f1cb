//! The engine: from a change to the list, to the state file, to the kernel, and back.
//!
//! Goals, which the parts below refer to:
//!
//! 1. What was acknowledged is in the list, on the disk and in the kernel. What was refused is
//!    in none of them, or is removed from the kernel as soon as that can be changed.
//! 2. After any error, only a listing shows what the kernel holds. Until it is read, the family is
//!    distrusted.
//! 3. One listing proves nothing: iptables and ipset exit with 0 after an incomplete one. If it
//!    differs from the list by more than the batch in progress, two consecutive listings, or at a
//!    start two simultaneous ones, must agree before anything is inserted or deleted.
//! 4. There is one way to repair: read, compare, rewrite. After a batch fails, the repair runs
//!    with its changes in the list, which retries them, and then without them.
//! 5. No batch takes longer than [`BATCH_LIMIT`].

use super::ipset::{SetEdit, SetHeader};
use super::iptables::{KernelRule, RuleEdit, TaggedRule};
use super::list::{Batch, Difference, Entry, Group, List, MANY_SETS, Members, Outcome};
use super::process::ToolError;
use super::reconcile::{Listing, is_slow};
use super::sets;
use crate::clock::{self, Clock, Stopwatch};
use crate::http::api_error::ApiError;
use crate::log::{Level, Log};
use crate::metrics::{Label, Metrics};
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, Change, Filter};
use crate::state::StateFile;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::iter;
use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The time limit of one batch, repairs included.
pub const BATCH_LIMIT: Duration = Duration::from_secs(30);
/// The time limit of a start.
const START_LIMIT: Duration = Duration::from_secs(600);
/// The time limit of one program, and its extension for each edit: ten times what a healthy kernel
/// needs.
const TOOL_LIMIT: Duration = Duration::from_secs(10);
pub const START_TOOL_LIMIT: Duration = Duration::from_secs(60);
const EDIT_LIMIT: Duration = Duration::from_micros(20);
/// The extension for each rule of the list, in edits: even to change one of 100,000, iptables-nft
/// reads all, which takes up to 0.1 ms each on a busy processor.
const EDITS_PER_RULE: usize = 5;
/// The same for each edit of the rules: to move 20,000 that a foreign rule precedes to the front,
/// iptables-nft takes 4.5 s. Its time grows with their square (180 s for 100,000 at a start), so this
/// counts once for each [`MANY_EDITS`].
const EDITS_PER_RULE_EDIT: usize = 20;
const MANY_EDITS: usize = 20_000;
/// The shortest pause after a check of the kernel, and the pause as a multiple of its processor time:
/// checks use less than 5 % of one processor. A slow check delays requests, so the pause is also as
/// long as the check.
const PAUSE: Duration = Duration::from_millis(900);
const PAUSE_FACTOR: u32 = 20;
/// The longest pause after a failed check.
const FAILED_PAUSE: Duration = Duration::from_secs(10);
/// The shortest time between two checks of every address in sets; each check compares their sizes.
const SETS_PAUSE: Duration = Duration::from_secs(30);
/// The pause after a failure to rewrite the state file.
const COMPACTION_PAUSE: Duration = Duration::from_secs(60);
/// How many times a repair is attempted: the sets and rules of two families may each report a
/// failure after they did their work.
const MAX_REPAIRS: usize = 5;
/// How many addresses of a set are looked up one by one; for more, the whole set is read.
const MAX_FEW: usize = 8;
/// If more rules than this are deleted at once, and they are replaced or the searches for them are long,
/// the chain is read first: see `reconcile`.
const MAX_DELETIONS: usize = 64;
/// If more rules than this are inserted at once, the guards are moved instead of counted over: to
/// find the position of each rule, iptables-nft takes time that grows with their square.
const MAX_NUMBERED: usize = 1_000;
const UNRESTORED: &str = "Any part of it that took effect is undone as soon as possible.";
const UNCHECKED: &str =
    "The change was not attempted, because the kernel's rules could not be checked first.";

/// The kernel, in six verbs. Each fails after `limit`.
pub trait Kernel: Sync {
    fn families(&self) -> Vec<Family>;
    fn read_rules(&self, family: Family, limit: Duration) -> Result<Listing, ToolError>;
    /// All edits or none.
    fn write_rules(
        &self,
        family: Family,
        edits: &[RuleEdit],
        limit: Duration,
    ) -> Result<(), ToolError>;
    fn read_headers(&self, limit: Duration) -> Result<Vec<SetHeader>, ToolError>;
    /// Each address of a set, with its timeout, sorted; `None` if there is no such set.
    fn read_set(&self, name: &str, limit: Duration) -> Result<Option<Vec<(Net, u32)>>, ToolError>;
    /// The edits before the one that fails remain in effect.
    fn write_sets(
        &self,
        edits: &mut dyn Iterator<Item = SetEdit<'_>>,
        limit: Duration,
    ) -> Result<(), ToolError>;
}

impl From<ToolError> for ApiError {
    fn from(error: ToolError) -> ApiError {
        match error {
            ToolError::Rejected(text) => ApiError::Iptables(text),
            ToolError::Transient(sentence) => ApiError::Busy(sentence),
        }
    }
}

/// What matters here of rfw.conf and of this host.
pub struct Settings {
    /// The rules for the port of rfw's own server, in the order of each chain.
    pub guards: Vec<TaggedRule>,
    /// The maximum number of addresses in a set; `None` without sets.
    pub sets: Option<usize>,
    /// The maximum number of edits in one transaction.
    pub max_edits: usize,
    /// The maximum number of deletions in one transaction, if it may be divided.
    pub max_deletions: usize,
    /// Whether it is faster if two programs read rules at once: not with one processor, nor with
    /// iptables-legacy, which holds a lock meanwhile.
    pub reads_at_once: bool,
}

pub struct Engine<K> {
    pub(super) kernel: K,
    pub(super) list: List,
    pub(super) state: Option<StateFile>,
    pub(super) settings: Settings,
    pub(super) clock: Clock,
    pub(super) log: Arc<Log>,
    pub(super) metrics: Arc<Metrics>,
    /// The families whose rules and sets must be read before they are changed (goal 2).
    pub(super) distrusted: BTreeSet<Family>,
    /// When the batch in progress must have ended.
    pub(super) deadline: Instant,
    pub(super) next_check: Instant,
    pub(super) next_compaction: Instant,
    pub(super) next_sets_check: Instant,
    /// The last times at which foreign rules preceded rfw's, at most [`MAX_OVERTAKEN`] per family.
    pub(super) overtaken: BTreeMap<Family, VecDeque<Instant>>,
    /// Packets and bytes that the rules of each label have matched.
    pub(super) traffic: BTreeMap<Label, (u64, u64)>,
    /// The same for each rule in the last complete listing of its family, by its hash, because a rule
    /// takes 100 bytes. Rules that have matched nothing are left out.
    pub(super) listed: BTreeMap<Family, HashMap<u64, (u64, u64)>>,
    /// Why the last check failed; logged when it changes.
    pub(super) outage: Option<ToolError>,
    /// The same for the last attempt to rewrite the state file.
    compaction_failure: Option<String>,
    /// The parts of a check, in order: the sets (`None`) and the rules of each family.
    pub(super) parts: Vec<Option<Family>>,
    /// Whether anything was repaired since the last check, apart from what a batch changed.
    pub(super) has_repaired: bool,
    /// While rfw starts, no request waits, so a program may take longer.
    pub(super) is_starting: bool,
}

impl<K: Kernel> Engine<K> {
    /// An engine that is starting, with an empty list.
    pub fn new(
        kernel: K,
        state: Option<StateFile>,
        settings: Settings,
        log: Arc<Log>,
        metrics: Arc<Metrics>,
    ) -> Engine<K> {
        let now = Instant::now();
        let parts = iter::once(None).chain(kernel.families().into_iter().map(Some)).collect();
        Engine {
            kernel,
            list: List::new(settings.sets),
            state,
            settings,
            clock: Clock::start(),
            log,
            metrics,
            distrusted: BTreeSet::new(),
            deadline: clock::after(START_LIMIT),
            next_check: now,
            next_compaction: now,
            next_sets_check: now,
            overtaken: BTreeMap::new(),
            traffic: BTreeMap::new(),
            listed: BTreeMap::new(),
            outage: None,
            compaction_failure: None,
            parts,
            has_repaired: false,
            is_starting: true,
        }
    }

    /// Carries out changes in order and returns a result for each. Single changes to one family
    /// form a batch; a list is a batch of its own, because it is applied entirely or not at all.
    pub fn commit(&mut self, changes: &[Change]) -> Vec<Result<Outcome, ApiError>> {
        self.begin();
        self.follow_clock();
        // The error is logged.
        let _ = self.expire();
        let mut results = vec![Ok(Outcome::default()); changes.len()];
        for family in [Some(Family::V4), Some(Family::V6), None] {
            let slots = results.iter_mut().zip(changes);
            let (slots, batch): (Vec<_>, Vec<_>) =
                slots.filter(|(_, change)| change.family() == family).unzip();
            let committed = self.commit_batch(&batch);
            slots.into_iter().zip(committed).for_each(|(slot, result)| *slot = result);
        }
        self.metrics.batches.add(1);
        let has_failed = |result: &&_| {
            matches!(result, Err(ApiError::Iptables(_) | ApiError::Busy(_) | ApiError::State(_)))
        };
        self.metrics.kernel_failures.add(results.iter().filter(has_failed).count());
        results
    }

    /// If the kernel rejects a batch, each half is attempted, so that only bad changes fail. If the
    /// disk does, all fail: each attempt may rewrite the whole state file.
    fn commit_batch(&mut self, changes: &[&Change]) -> Vec<Result<Outcome, ApiError>> {
        match self.attempt(changes) {
            Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
            Err(error @ (ApiError::Busy(_) | ApiError::State(_))) => {
                vec![Err(error); changes.len()]
            }
            Err(_) if changes.len() > 1 => {
                let (first, second) = changes.split_at(changes.len() / 2);
                let mut results = self.commit_batch(first);
                results.extend(self.commit_batch(second));
                results
            }
            Err(error) => vec![Err(error); changes.len()],
        }
    }

    /// Commits changes, all or none: list, disk, kernel (goal 1).
    fn attempt(&mut self, changes: &[&Change]) -> Result<Vec<Outcome>, ApiError> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        // A distrusted family is repaired before the list changes: a later repair would write the
        // change a second time.
        let of_family = |family: &Family| changes.iter().any(|change| change.concerns(*family));
        let families: Vec<Family> = self.kernel.families().into_iter().filter(of_family).collect();
        let settled = self.settle(&families, None);
        settled.map_err(|error| ApiError::from(error).with_note(UNCHECKED))?;
        if self.state.as_ref().is_some_and(|state| state.is_outdated) {
            self.compact().map_err(ApiError::State)?;
        }
        let batch = self.list.apply(changes, self.now())?;
        let recorded = match &mut self.state {
            Some(state) => state.append(self.list.records(&batch)).map_err(ApiError::State),
            None => Ok(()),
        };
        let written = recorded.and_then(|()| Ok(self.write_through(&batch)?));
        if let Err(error) = written {
            self.list.undo(&batch);
            self.state.iter_mut().for_each(StateFile::undo_append);
            if self.has_time() && !matches!(error, ApiError::State(_)) {
                // A repair would tolerate a timeout that differs by a few seconds.
                let _ = self.write_sets(&batch, true);
            }
            let is_restored = self.has_time() && self.settle(&families, Some(&batch)).is_ok();
            for set in batch.created.iter().filter_map(Group::set) {
                if self.has_time() {
                    let _ = self.write_set(SetEdit::Destroy(&set.to_string()));
                }
            }
            if is_restored {
                return Err(error);
            }
            self.next_check = Instant::now();
            return Err(error.with_note(UNRESTORED));
        }
        Ok(batch.outcomes)
    }

    /// Makes the kernel follow a batch that is already in the list. A write that failed may have
    /// taken effect, so a repair completes it (goals 2 and 4).
    fn write_through(&mut self, batch: &Batch) -> Result<(), ToolError> {
        let is_changed = |family: &Family| batch.groups().any(|group| group.family == *family);
        let families: Vec<_> = self.kernel.families().into_iter().filter(is_changed).collect();
        let mut written = self.write(batch, &families);
        if written.is_err() && self.has_time() {
            self.distrusted.extend(&families);
            written = self.settle(&families, Some(batch));
        }
        if written.is_err() {
            // The next repair undoes or completes what reached the kernel.
            self.distrusted.extend(families);
        }
        written
    }

    /// Repairs the families that are distrusted. A repair that failed may have taken effect; the
    /// next attempt sees that.
    pub fn settle(&mut self, families: &[Family], batch: Option<&Batch>) -> Result<(), ToolError> {
        let mut settled = Ok(());
        for _ in 0..MAX_REPAIRS {
            settled =
                families.iter().try_for_each(|family| match self.distrusted.contains(family) {
                    true => self.check_rules(*family, None, batch, false),
                    false => Ok(()),
                });
            if settled.is_ok() || !self.has_time() {
                break;
            }
        }
        settled
    }

    /// An address that moves to another set leaves the old one only when the rule of the new one
    /// is in the kernel: for a moment it is in both rather than in neither.
    fn write(&mut self, batch: &Batch, families: &[Family]) -> Result<(), ToolError> {
        let relied = self.relied_on(batch, families);
        // Meanwhile, the rules of the sets are read, unless they change.
        let reads_meanwhile =
            self.list.sets.is_some() && batch.created.is_empty() && !relied.is_empty();
        let (written, mut listings) = thread::scope(|scope| {
            let engine = &*self;
            let read =
                || relied.iter().map(|family| (*family, engine.read_rules(*family))).collect();
            // Without a thread, they are read below.
            let spawn = || thread::Builder::new().spawn_scoped(scope, read).ok();
            let reading = reads_meanwhile.then(spawn).flatten();
            let written = self.write_sets(batch, true);
            let listings: Option<BTreeMap<_, _>> = reading.and_then(|reading| reading.join().ok());
            (written, listings.unwrap_or_default())
        });
        written?;
        for family in families.iter().copied() {
            match self.rule_edits(batch, family) {
                Some(edits) if !batch.created.iter().any(|group| group.family == family) => {
                    self.write_rules(family, &edits)?;
                    // A number counts the rules in front that rfw knows of, but not foreign ones.
                    let is_numbered = |edit: &RuleEdit| matches!(edit, RuleEdit::Insert(2.., _));
                    if relied.contains(&family) || edits.iter().any(is_numbered) {
                        let listing = listings.remove(&family).filter(|_| edits.is_empty());
                        self.check_rules(family, listing.transpose()?, Some(batch), false)?;
                    }
                }
                _ => self.check_rules(family, None, Some(batch), true)?,
            }
        }
        self.write_sets(batch, false)
    }

    /// What a batch changed or confirmed in the rules of a family, except those in sets.
    pub(super) fn rule_differences(
        &self,
        batch: &Batch,
        family: Family,
    ) -> impl Iterator<Item = Difference> + Clone {
        let is_rule = move |group: &Group| group.family == family && !self.list.is_in_set(group);
        self.list.differences(batch, is_rule)
    }

    /// Creates the sets of a batch and adds its addresses or, in a later step, deletes them.
    fn write_sets(&self, batch: &Batch, is_put: bool) -> Result<(), ToolError> {
        let (now, maxelem) = (self.seconds(), self.list.maxelem());
        let is_kept = |group: &Group| {
            self.list.is_in_set(group) && self.kernel.families().contains(&group.family)
        };
        let named = batch.groups().filter(|group| is_kept(group));
        let named: BTreeMap<Group, String> =
            named.filter_map(|group| Some((*group, group.set()?.to_string()))).collect();
        // After an undo, the list no longer has the new sets.
        let is_created =
            |group| is_put && batch.created.contains(group) && self.list.members(group).is_some();
        let creations = named.iter().filter(|(group, _)| is_created(group));
        // A set of that name may be there, because a foreign rule uses it.
        let creations = creations.flat_map(|(group, name)| {
            let (family, entries) =
                (group.family, self.list.members(group).map_or(0, Members::len));
            [SetEdit::Create { name, family, entries, maxelem }, SetEdit::Flush(name)]
        });
        let part = self.list.differences(batch, is_kept).filter(|d| d.after.is_some() == is_put);
        let changes =
            part.filter_map(|d| Some(sets::edit(named.get(&d.group)?, d.net, d.after, now)));
        self.kernel.write_sets(&mut creations.chain(changes), self.limit(batch.len()))
    }

    /// The edits that do to the kernel's rules what a batch did to the list: first the deletions in
    /// the order of the chain, which keeps iptables' search for each rule short, then the
    /// insertions, the newest last. `None` if the chain must be read first, or if that is faster.
    fn rule_edits(&self, batch: &Batch, family: Family) -> Option<Vec<RuleEdit>> {
        let (mut deleted, mut inserted) = (Vec::new(), Vec::new());
        for difference in self.rule_differences(batch, family) {
            let Difference { before, after, .. } = difference;
            if before == after {
                continue;
            }
            let rule = KernelRule::plain(difference.rule());
            let tagged = |expires| TaggedRule::new(rule, expires);
            deleted.extend(before.map(|e| (Reverse(e.serial), tagged(e.expires()))));
            inserted.extend(after.map(|e| tagged(e.expires())));
        }
        deleted.sort_unstable_by_key(|(order, _)| *order);
        let deleted: Vec<TaggedRule> = deleted.into_iter().map(|(_, tagged)| tagged).collect();
        let is_slow_in = |chain: &Chain| {
            let is_here = |tagged: &&TaggedRule| tagged.rule.rule.chain() == *chain;
            let deleted = deleted.iter().filter(is_here).count();
            let stay = self.wanted(family, *chain).count();
            is_slow(deleted.saturating_mul(stay), deleted.saturating_add(stay))
        };
        let may_be_slow = deleted.len() > MAX_DELETIONS;
        if may_be_slow && (!inserted.is_empty() || Chain::ALL.iter().any(is_slow_in))
            || self.list.has_twin(&deleted)
        {
            return None;
        }
        let is_large = inserted.len() > MAX_NUMBERED;
        let chains = Chain::ALL.iter().filter(|_| is_large);
        let moved: Vec<_> = chains.flat_map(|chain| self.front(family, *chain)).collect();
        let number = |tagged: &TaggedRule| match is_large {
            true => 1,
            false => self.front(family, tagged.rule.rule.chain()).count().saturating_add(1),
        };
        let deleted = deleted.iter().chain(&moved);
        let mut edits: Vec<_> = deleted.map(|tagged| RuleEdit::Delete(*tagged)).collect();
        edits.extend(inserted.iter().map(|tagged| RuleEdit::Insert(number(tagged), *tagged)));
        edits.extend(moved.iter().rev().map(|tagged| RuleEdit::Insert(1, *tagged)));
        Some(edits)
    }

    /// The families in which a batch relies on rules that it does not write: rules that exist
    /// already, the rules of sets, and foreign rules, which a check may leave in front.
    fn relied_on(&self, batch: &Batch, families: &[Family]) -> BTreeSet<Family> {
        let is_relied = |Difference { group, before, after, .. }: Difference| {
            let is_there = self.list.is_in_set(&group) || before == after;
            after.is_some() && (is_there || self.is_overtaken_often(group.family))
        };
        let of = |family| move |group: &Group| group.family == family;
        let is_one = |family: &Family| self.list.differences(batch, of(*family)).any(is_relied);
        families.iter().copied().filter(is_one).collect()
    }

    /// The rules that precede all others in a chain: guards, then those of sets.
    pub(super) fn front(&self, family: Family, chain: Chain) -> impl Iterator<Item = TaggedRule> {
        let is_here =
            move |rule: &KernelRule| (rule.rule.family(), rule.rule.chain()) == (family, chain);
        let guards = self.settings.guards.iter().filter(move |guard| is_here(&guard.rule)).copied();
        let sets = self.list.sets().map(|(rule, ..)| rule).filter(is_here);
        guards.chain(sets.map(|rule| TaggedRule::new(rule, None)))
    }

    /// To be called every second. The error is that of a program that hung.
    pub fn tick(&mut self) -> Option<ToolError> {
        self.begin();
        self.follow_clock();
        self.compact_if_needed();
        let expired = self.expire();
        self.destroy_empty_sets();
        let hung = self.hung(expired.err());
        if hung.is_some() || Instant::now() < self.next_check {
            return hung;
        }
        let watch = Stopwatch::start();
        let failure = self.check().err();
        if let Some(error) = failure.as_ref().filter(|_| failure != self.outage) {
            self.log.error(format_args!("cannot check what the kernel holds: {error}"));
        }
        self.metrics.kernel_failures.add(usize::from(failure.is_some()));
        self.count_rules();
        let pause = match (mem::take(&mut self.has_repaired), &failure) {
            // A repair is checked again soon.
            (true, _) => PAUSE,
            (false, None) => pause_after(&watch),
            (false, Some(_)) => watch.elapsed().saturating_mul(PAUSE_FACTOR).min(FAILED_PAUSE),
        };
        self.next_check = clock::after(pause.max(PAUSE));
        self.outage = failure.clone();
        self.hung(failure)
    }

    /// The error of a program that hung, for the requests that wait for the same program.
    fn hung(&self, error: Option<ToolError>) -> Option<ToolError> {
        error.filter(|error| error.is_transient() && !self.has_time())
    }

    /// Compares the kernel with the list and repairs it. A part that fails does not keep the others
    /// from being checked. After a hang no time is left for them, so the next check begins with
    /// another part.
    fn check(&mut self) -> Result<(), ToolError> {
        let mut result = Ok(());
        for (number, part) in self.parts.clone().into_iter().enumerate() {
            // An expiry may have taken all the time.
            if number == 0 || self.has_time() {
                let checked = match part {
                    None => self.check_sets(),
                    Some(family) => self.check_family(family),
                };
                result = result.and(checked);
            }
        }
        if !self.has_time() {
            self.parts.rotate_left(1);
        }
        result
    }

    /// Checks the rules of a family and, if it is distrusted, its sets. One that fails or takes long, or
    /// anything that failed in the last check, does not keep the rules from being repaired.
    fn check_family(&mut self, family: Family) -> Result<(), ToolError> {
        let may_fail = self.list.sets.is_some() || self.outage.is_some();
        if may_fail && self.distrusted.contains(&family) {
            let failure = self.repair_rules(family).err();
            if let Some(hung) = self.hung(failure) {
                return Err(hung);
            }
        }
        self.check_rules(family, None, None, false)
    }

    fn check_sets(&mut self) -> Result<(), ToolError> {
        if self.list.sets.is_none() {
            return Ok(());
        }
        let watch = Stopwatch::start();
        let is_due = Instant::now() >= self.next_sets_check;
        let (now, headers) = (self.seconds(), self.kernel.read_headers(self.limit(0))?);
        let is_right = |(rule, _, members): (KernelRule, &Group, &Members)| {
            let name = rule.to_string();
            let header = headers.iter().find(|header| header.name == name);
            header.is_some_and(|header| {
                header.is_compatible && sets::has_right_size(members, header.entries, now)
            })
        };
        let mut result = Ok(());
        for family in self.kernel.families() {
            // Those of a distrusted family are repaired with its rules.
            let is_trusted = !self.distrusted.contains(&family);
            let may_go_on = result.is_ok() || self.has_time();
            if is_trusted && (is_due || !self.sets(family).all(is_right)) && may_go_on {
                let repaired = self.repair_sets(family, None);
                let repaired = repaired.and_then(|moved| self.delete_moved(family, &moved));
                result = result.and(repaired);
            }
        }
        if is_due {
            self.next_sets_check = clock::after(pause_after(&watch).max(SETS_PAUSE));
        }
        result
    }

    /// Deletes the rules that are due. The state file needs no record of that: it holds the expiry.
    fn expire(&mut self) -> Result<(), ToolError> {
        let mut result = Ok(());
        for family in Family::ALL {
            let is_distrusted = self.distrusted.contains(&family);
            let batch = self.list.expire(family, self.seconds());
            if !is_distrusted && let Err(error) = self.write_through(&batch) {
                // The list no longer has them, so a check deletes those that remain.
                self.next_check = Instant::now();
                let count = batch.len();
                self.log.error(format_args!(
                    "{count} rules have expired and may still be in the kernel: {error}"
                ));
                result = result.and(Err(error));
                continue;
            }
            // The check that repairs a distrusted family deletes its rules, and reports them.
            let is_over = |group: &Group| !is_distrusted || self.list.is_in_set(group);
            let rules = self.list.differences(&batch, is_over);
            let rules: Vec<_> = rules.map(|d| KernelRule::plain(d.rule())).collect();
            self.metrics.expired.add(rules.len());
            self.log_each(Level::Info, "expired", &rules);
        }
        result
    }

    /// Makes room for others if there are many sets: a source that is gone must not keep its sets.
    fn destroy_empty_sets(&mut self) {
        if self.list.sets().count() < MANY_SETS {
            return;
        }
        for family in self.kernel.families() {
            let empty = self.sets(family).filter(|(.., members)| members.is_empty());
            let empty: Vec<_> = empty.map(|(rule, group, _)| (rule, *group)).collect();
            let delete = |(rule, _): &_| RuleEdit::Delete(TaggedRule::new(*rule, None));
            let edits: Vec<_> = empty.iter().map(delete).collect();
            if self.distrusted.contains(&family) || self.write_rules(family, &edits).is_err() {
                self.distrusted.insert(family);
                continue;
            }
            for (rule, group) in empty {
                self.list.forget(&group);
                if self.has_time() {
                    // One that a foreign rule uses stays; it is used again, or the next start sees to it.
                    let _ = self.write_set(SetEdit::Destroy(&rule.to_string()));
                }
            }
        }
    }

    /// If the wall clock was set, all expiries move with it: in the list, the kernel and the file.
    fn follow_clock(&mut self) {
        let before = self.clock.now().as_secs();
        let Some(seconds) = self.clock.follow(clock::wall()) else { return };
        self.log.warning(format_args!("the clock changed by {seconds} s; all expiries follow"));
        self.list.shift(before, seconds);
        self.state.iter_mut().for_each(|state| state.is_outdated = true);
        self.distrusted.extend(self.kernel.families());
        self.next_check = Instant::now();
        self.next_compaction = Instant::now();
    }

    /// Rewrites the state file. The error is a sentence.
    pub fn compact(&mut self) -> Result<(), String> {
        self.state.as_mut().map_or(Ok(()), |state| state.replace(self.list.stored()))
    }

    /// Rewrites the state file if it is large or outdated. After a failure, it waits a minute.
    fn compact_if_needed(&mut self) {
        // A start would read what an append that failed has left.
        let _ = self.state.as_mut().map(StateFile::repair_tail);
        let is_needed = |state: &StateFile| state.is_outdated || state.is_large();
        if Instant::now() < self.next_compaction || !self.state.as_ref().is_some_and(is_needed) {
            return;
        }
        let failure = self.compact().err();
        if let Some(sentence) = failure.as_ref().filter(|_| failure != self.compaction_failure) {
            self.log.error(format_args!("{sentence}"));
        }
        if failure.is_some() {
            self.next_compaction = clock::after(COMPACTION_PAUSE);
        }
        self.compaction_failure = failure;
    }

    /// rfw's rules except the guards, from the kernel, each with its number among all rules of its
    /// chain. A listing that shows a rule twice, or differs from the list, is read again until two
    /// agree. The rule of a set stands for its addresses, unless only a few are asked for.
    pub fn listing(&mut self, filter: &Filter) -> Result<Vec<(usize, TaggedRule)>, ToolError> {
        self.begin();
        let mut rules = Vec::new();
        let is_asked = |family: &Family| filter.net.is_none_or(|net| net.family() == *family);
        for family in self.kernel.families().into_iter().filter(is_asked) {
            let mut listing = self.read_rules(family)?;
            if !self.is_right(family, &listing) {
                listing = self.confirmed_rules(family, listing)?;
            }
            for (number, tagged) in listing.own() {
                let KernelRule { rule, .. } = &tagged.rule;
                let is_set = tagged.rule.template().is_some();
                if is_set && filter.covers(rule.chain(), rule.tag) {
                    rules.extend(iter::repeat(number).zip(self.entries(&tagged.rule, filter)));
                } else if !tagged.rule.is_guard() && filter.admits(rule) {
                    rules.push((number, *tagged));
                }
            }
        }
        Ok(rules)
    }

    /// The rule of a set or, if only a few of its addresses overlap the block, those.
    fn entries(&self, set: &KernelRule, filter: &Filter) -> Vec<TaggedRule> {
        let whole = || vec![TaggedRule::new(*set, None)];
        let (Some(template), Some(net)) = (set.template(), filter.net) else { return whole() };
        let entries = self.list.overlapping(template, net).take(MAX_FEW + 1);
        let entry = |(net, entry): (Net, Entry)| {
            TaggedRule::new(KernelRule::plain(template.rule(net)), entry.expires())
        };
        let entries: Vec<TaggedRule> = entries.map(entry).collect();
        if entries.len() > MAX_FEW { whole() } else { entries }
    }

    /// Unix seconds, rounded up: no rule expires early.
    pub(super) fn now(&self) -> u64 {
        self.clock.now().saturating_add(Duration::from_nanos(999_999_999)).as_secs()
    }

    /// Unix seconds, rounded down: a timeout that is counted from here does not end early either.
    pub(super) fn seconds(&self) -> u64 {
        self.clock.now().as_secs()
    }

    fn begin(&mut self) {
        self.deadline = clock::after(BATCH_LIMIT);
    }

    /// Whether the batch may attempt more. One that has used up the time limit of a program counts as
    /// one in which a program hung.
    pub fn has_time(&self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        left > BATCH_LIMIT.saturating_sub(TOOL_LIMIT)
    }

    pub(super) fn rules_limit(&self, family: Family, edits: usize) -> Duration {
        let held = self.list.count_rules(family).saturating_mul(EDITS_PER_RULE);
        let per_edit = EDITS_PER_RULE_EDIT.saturating_mul(edits.div_ceil(MANY_EDITS));
        self.limit(held.saturating_add(edits.saturating_mul(per_edit)))
    }

    /// The time limit of a program with this number of edits (goal 5).
    pub fn limit(&self, edits: usize) -> Duration {
        let extension = EDIT_LIMIT.saturating_mul(u32::try_from(edits).unwrap_or(u32::MAX));
        let left = self.deadline.saturating_duration_since(Instant::now());
        let limit = if self.is_starting { START_TOOL_LIMIT } else { TOOL_LIMIT };
        limit.saturating_add(extension).min(left)
    }
}

/// The pause after a check that succeeded.
fn pause_after(check: &Stopwatch) -> Duration {
    check.processor().saturating_mul(PAUSE_FACTOR).max(check.elapsed())
}

#[cfg(test)]
mod tests;
