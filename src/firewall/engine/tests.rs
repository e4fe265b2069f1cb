//! The engine against a kernel that fails in every way at every step, and against a model.
//!
//! [`FakeKernel`] holds chains and sets in memory and fails as a [`Fault`] says. [`World`] is that
//! kernel, the engine, the state file and the [`Model`]: the rules that were acknowledged. After
//! any sequence of changes, faults, damage and restarts, all of them must agree.
//!
//! `#[cfg(test)]` in engine.rs includes this file.

use super::super::guards;
use super::super::iptables::RuleKind;
use super::super::list::tests::may_shadow;
use super::super::list::{Tally, Verdict};
use super::super::start;
use super::*;
use crate::rule::tag::Tag;
use crate::rule::whitelist::Whitelist;
use crate::rule::{Action, Match, Rule, RuleTemplate, Rules, Target};
use crate::state::Record;
use std::collections::BTreeMap;
use std::fs;
use std::panic;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

// ---------------------------------------------------------------------------------------------
// The fake kernel

#[derive(Clone, PartialEq, Debug)]
enum FakeRow {
    Own(TaggedRule),
    Foreign(String),
}

#[derive(Clone, PartialEq, Debug)]
struct FakeSet {
    maxelem: usize,
    /// When each entry expires.
    entries: BTreeMap<Net, Option<u64>>,
}

/// How a call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Reject,
    Interrupt,
    DoAndReject,
    DoAndInterrupt,
    /// Only for sets: this number of edits is carried out.
    PartAndReject(usize),
    PartAndInterrupt(usize),
    /// Only for listings: exit status 0 after a false one.
    Lie(Lie),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lie {
    Empty,
    FirstHalf,
    WithoutSecond,
    Twice,
}

const READ_WAYS: [Way; 6] = [
    Way::Reject,
    Way::Interrupt,
    Way::Lie(Lie::Empty),
    Way::Lie(Lie::FirstHalf),
    Way::Lie(Lie::WithoutSecond),
    Way::Lie(Lie::Twice),
];

const WRITE_WAYS: [Way; 8] = [
    Way::Reject,
    Way::Interrupt,
    Way::DoAndReject,
    Way::DoAndInterrupt,
    Way::PartAndReject(1),
    Way::PartAndInterrupt(1),
    Way::PartAndReject(2),
    Way::PartAndInterrupt(2),
];

/// The parts of the kernel. Calls are counted for each, because some run at the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Rules(Family),
    Sets,
}

/// Which calls fail, counted from 1 in each part, and how.
#[derive(Clone, Copy, Debug)]
struct Fault {
    part: Option<Part>,
    first: usize,
    count: usize,
    way: Way,
    family: Option<Family>,
    only_writes: bool,
}

impl Fault {
    fn new(first: usize, count: usize, way: Way) -> Fault {
        Fault { part: None, first, count, way, family: None, only_writes: false }
    }

    fn always(way: Way) -> Fault {
        Fault::new(1, usize::MAX, way)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Call {
    Read,
    WriteRules,
    WriteSets,
}

impl Call {
    /// The ways that differ for this call.
    fn ways(self) -> &'static [Way] {
        match self {
            Call::Read => &READ_WAYS,
            Call::WriteRules => &WRITE_WAYS[..4],
            Call::WriteSets => &WRITE_WAYS,
        }
    }
}

#[derive(Default)]
struct Memory {
    chains: BTreeMap<(Family, Chain), Vec<FakeRow>>,
    sets: BTreeMap<String, FakeSet>,
    faults: Vec<Fault>,
    /// A rule or entry with this address is always rejected.
    bad: Option<Net>,
    /// A set that cannot be created.
    bad_set: Option<String>,
    /// With more edits than this, a transaction is too long.
    max_edits: Option<usize>,
    calls: Vec<(Part, Call)>,
    /// The longest time that a call was allowed.
    limit: Duration,
    /// How long each call of a part takes.
    delay: Option<(Part, Duration)>,
    /// After this number of listings, someone flushes all chains once.
    flush_after_reads: usize,
    /// `ipset save` hangs: the set is large, and the host busy.
    are_sets_unreadable: bool,
    /// An entry of a set expires after each listing of it.
    is_one_due: bool,
    /// An address that must be in a set with a rule at every moment.
    watched: Option<Net>,
}

#[derive(Clone, Default)]
struct FakeKernel(Arc<Mutex<Memory>>);

fn rejected<T>(message: &str) -> Result<T, ToolError> {
    Err(ToolError::Rejected(message.into()))
}

fn interrupted<T>() -> Result<T, ToolError> {
    Err(ToolError::Transient("killed by a signal".into()))
}

impl Memory {
    fn chain(&mut self, family: Family, chain: Chain) -> &mut Vec<FakeRow> {
        self.chains.entry((family, chain)).or_default()
    }

    /// Records a call, and returns how it fails.
    fn begin(
        &mut self,
        part: Part,
        call: Call,
        family: Option<Family>,
        limit: Duration,
    ) -> Option<Way> {
        self.calls.push((part, call));
        let slow = self.delay.filter(|(slow, _)| *slow == part);
        slow.iter().for_each(|(_, delay)| thread::sleep(*delay));
        self.limit = self.limit.max(limit);
        if limit.is_zero() {
            return Some(Way::Interrupt);
        }
        let number = self.calls.iter().filter(|(known, _)| *known == part).count();
        let is_write = call != Call::Read;
        let applies = |fault: &&Fault| {
            (fault.first..fault.first.saturating_add(fault.count)).contains(&number)
                && fault.part.is_none_or(|wanted| wanted == part)
                && (fault.family.is_none() || fault.family == family)
                && (is_write || !fault.only_writes)
                && !(is_write && matches!(fault.way, Way::Lie(_)))
        };
        self.faults.iter().find(applies).map(|fault| fault.way)
    }

    fn writes(&self) -> usize {
        self.calls.iter().filter(|(_, call)| *call != Call::Read).count()
    }

    fn is_referenced(&self, set: &str) -> bool {
        self.chains.values().flatten().any(|row| match row {
            FakeRow::Own(tagged) => {
                tagged.rule.template().is_some() && tagged.rule.to_string() == set
            }
            FakeRow::Foreign(line) => line.split(' ').any(|word| word == set),
        })
    }

    fn check_watched(&self) {
        let Some(net) = self.watched else { return };
        let holds = |(name, set): (&String, &FakeSet)| {
            self.is_referenced(name) && set.entries.contains_key(&net)
        };
        assert!(self.sets.iter().any(holds), "{net} is in no set with a rule");
    }

    fn edit_rule(&mut self, family: Family, edit: &RuleEdit) -> Result<(), ToolError> {
        let tagged = edit.tagged();
        assert_eq!(tagged.rule.rule.family(), family);
        if tagged.rule.rule.addresses().any(|net| Some(net) == self.bad) {
            return rejected("bad address");
        }
        let name = tagged.rule.template().map(|_| tagged.rule.to_string());
        if name.is_some_and(|name| !self.sets.contains_key(&name)) {
            return rejected("set does not exist");
        }
        let chain = self.chain(family, tagged.rule.rule.chain());
        match edit {
            RuleEdit::Delete(tagged) => {
                // Like ip6tables-nft, and like 1.8.11.
                let key = |tagged: &TaggedRule| {
                    let KernelRule { rule, .. } = tagged.rule;
                    let set = tagged.rule.template().map(|_| tagged.rule.to_string());
                    (tagged.deletion_key(), set, (family == Family::V4).then(|| rule.sides()))
                };
                let is_it = |row: &FakeRow| matches!(row, FakeRow::Own(o) if key(o) == key(tagged));
                let Some(at) = chain.iter().position(is_it) else {
                    return rejected("no such rule");
                };
                chain.remove(at);
            }
            RuleEdit::Insert(number, tagged) => {
                if *number > chain.len() + 1 {
                    return rejected("index of insertion too big");
                }
                chain.insert(number - 1, FakeRow::Own(*tagged));
            }
        }
        Ok(())
    }

    fn edit_set(&mut self, edit: &SetEdit) -> Result<(), ToolError> {
        let now = clock::wall().as_secs();
        let is_bad = |net: &Net| Some(*net) == self.bad;
        let missing = || rejected("set does not exist");
        match edit {
            SetEdit::Create { name, .. } if self.bad_set.as_deref() == Some(*name) => {
                return rejected("no memory");
            }
            SetEdit::Create { name, entries, maxelem, .. } => {
                let maxelem = *maxelem.max(entries);
                match self.sets.get(*name) {
                    Some(set) if set.maxelem != maxelem => return rejected("set exists"),
                    Some(_) => {}
                    None => {
                        let set = FakeSet { maxelem, entries: BTreeMap::new() };
                        self.sets.insert(name.to_string(), set);
                    }
                }
            }
            SetEdit::Add { name, net, timeout } => {
                if is_bad(net) {
                    return rejected("bad address");
                }
                let Some(set) = self.sets.get_mut(*name) else { return missing() };
                set.entries.retain(|_, expires| expires.is_none_or(|second| second > now));
                if set.entries.len() >= set.maxelem && !set.entries.contains_key(net) {
                    return rejected("set is full");
                }
                let expires = (*timeout > 0).then(|| now + u64::from(*timeout));
                set.entries.insert(*net, expires);
            }
            SetEdit::Delete { name, net } => {
                let Some(set) = self.sets.get_mut(*name) else { return missing() };
                set.entries.remove(net);
            }
            SetEdit::Flush(name) => {
                let Some(set) = self.sets.get_mut(*name) else { return missing() };
                set.entries.clear();
            }
            SetEdit::Swap(a, b) => {
                let (Some(first), Some(second)) = (self.sets.remove(*a), self.sets.remove(*b))
                else {
                    panic!("swap of {a} and {b}, of which one does not exist");
                };
                self.sets.insert(a.to_string(), second);
                self.sets.insert(b.to_string(), first);
            }
            SetEdit::Destroy(name) => {
                if self.is_referenced(name) {
                    return rejected("set is in use");
                }
                if self.sets.remove(*name).is_none() {
                    return missing();
                }
            }
        }
        Ok(())
    }
}

fn lie<T: Clone>(lie: Lie, rows: &mut Vec<T>) {
    match lie {
        Lie::Empty => rows.clear(),
        Lie::FirstHalf => rows.truncate(rows.len() / 2),
        Lie::WithoutSecond if rows.len() > 1 => drop(rows.remove(1)),
        Lie::WithoutSecond => {}
        Lie::Twice => *rows = rows.iter().flat_map(|row| [row.clone(), row.clone()]).collect(),
    }
}

/// The rows that a listing shows.
fn listed<T: Clone>(way: Option<Way>, mut rows: Vec<T>) -> Result<Vec<T>, ToolError> {
    match way {
        Some(Way::Reject | Way::DoAndReject | Way::PartAndReject(_)) => rejected("failed"),
        Some(Way::Interrupt | Way::DoAndInterrupt | Way::PartAndInterrupt(_)) => interrupted(),
        Some(Way::Lie(kind)) => {
            lie(kind, &mut rows);
            Ok(rows)
        }
        None => Ok(rows),
    }
}

fn family_of_set(name: &str) -> Option<Family> {
    Some(if name.starts_with("rfw4") { Family::V4 } else { Family::V6 })
}

fn name_of<'a>(edit: &SetEdit<'a>) -> &'a str {
    match edit {
        SetEdit::Create { name, .. } | SetEdit::Add { name, .. } | SetEdit::Delete { name, .. } => {
            name
        }
        SetEdit::Flush(name) | SetEdit::Swap(name, _) | SetEdit::Destroy(name) => name,
    }
}

impl FakeKernel {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap()
    }
}

impl Kernel for FakeKernel {
    fn families(&self) -> Vec<Family> {
        Family::ALL.to_vec()
    }

    fn read_rules(&self, family: Family, limit: Duration) -> Result<Listing, ToolError> {
        let mut memory = self.lock();
        let way = memory.begin(Part::Rules(family), Call::Read, Some(family), limit);
        let mut rows = Vec::new();
        for chain in Chain::ALL {
            rows.extend(memory.chain(family, chain).iter().map(|row| (chain, row.clone())));
        }
        let mut listing = Listing::default();
        for (chain, row) in listed(way, rows)? {
            match row {
                FakeRow::Own(tagged) => listing.push(chain, Some(tagged), ""),
                FakeRow::Foreign(line) => listing.push(chain, None, &line),
            }
        }
        if memory.flush_after_reads == 1 {
            memory.chains.clear();
        }
        memory.flush_after_reads = memory.flush_after_reads.saturating_sub(1);
        Ok(listing)
    }

    fn write_rules(
        &self,
        family: Family,
        edits: &[RuleEdit],
        limit: Duration,
    ) -> Result<(), ToolError> {
        if edits.is_empty() {
            return Ok(());
        }
        let mut memory = self.lock();
        let way = memory.begin(Part::Rules(family), Call::WriteRules, Some(family), limit);
        match way {
            Some(Way::Reject | Way::PartAndReject(_)) => return rejected("failed"),
            Some(Way::Interrupt | Way::PartAndInterrupt(_)) => return interrupted(),
            _ if memory.max_edits.is_some_and(|max| edits.len() > max) => {
                return rejected("line 9 failed");
            }
            _ => {}
        }
        let before = memory.chains.clone();
        if let Err(error) = edits.iter().try_for_each(|edit| memory.edit_rule(family, edit)) {
            memory.chains = before;
            return Err(error);
        }
        memory.check_watched();
        match way {
            Some(Way::DoAndReject) => rejected("failed after COMMIT"),
            Some(_) => interrupted(),
            None => Ok(()),
        }
    }

    fn read_headers(&self, limit: Duration) -> Result<Vec<SetHeader>, ToolError> {
        let mut memory = self.lock();
        let way = memory.begin(Part::Sets, Call::Read, None, limit);
        let now = clock::wall().as_secs();
        let header = |(name, set): (&String, &FakeSet)| {
            let live = set.entries.values().filter(|e| e.is_none_or(|second| second > now));
            let (name, entries) = (name.clone(), Some(live.count()));
            SetHeader { name, is_compatible: true, maxelem: set.maxelem, entries }
        };
        let headers = memory.sets.iter().map(header).collect();
        listed(way, headers)
    }

    fn read_set(&self, name: &str, limit: Duration) -> Result<Option<Vec<(Net, u32)>>, ToolError> {
        let mut memory = self.lock();
        let way = memory.begin(Part::Sets, Call::Read, family_of_set(name), limit);
        if memory.are_sets_unreadable {
            return interrupted();
        }
        let now = clock::wall().as_secs();
        let left = |expires: &Option<u64>| match expires {
            None => Some(0),
            Some(second) if *second > now => Some((*second - now) as u32),
            Some(_) => None,
        };
        let entries = memory.sets.get(name).map(|set| {
            let entries = set.entries.iter();
            entries.filter_map(|(net, expires)| Some((*net, left(expires)?))).collect()
        });
        if memory.is_one_due {
            let set = memory.sets.get_mut(name).unwrap();
            let due = set.entries.iter().find(|(_, expires)| expires.is_some());
            due.map(|(net, _)| *net).and_then(|net| set.entries.remove(&net));
        }
        let exists = entries.is_some();
        Ok(Some(listed(way, entries.unwrap_or_default())?).filter(|_| exists))
    }

    fn write_sets(
        &self,
        edits: &mut dyn Iterator<Item = SetEdit<'_>>,
        limit: Duration,
    ) -> Result<(), ToolError> {
        let mut edits = edits.peekable();
        let Some(first) = edits.peek() else { return Ok(()) };
        let family = family_of_set(name_of(first));
        let mut memory = self.lock();
        let way = memory.begin(Part::Sets, Call::WriteSets, family, limit);
        let count = match way {
            Some(Way::Reject | Way::Interrupt) => 0,
            Some(Way::PartAndReject(count) | Way::PartAndInterrupt(count)) => count,
            _ => usize::MAX,
        };
        for edit in edits.take(count) {
            memory.edit_set(&edit)?;
            memory.check_watched();
        }
        match way {
            Some(Way::Reject | Way::DoAndReject | Way::PartAndReject(_)) => rejected("failed"),
            Some(_) => interrupted(),
            None => Ok(()),
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The model: what was acknowledged

/// The rules, the oldest first.
#[derive(Clone, Default, Debug)]
struct Model {
    sets: bool,
    rules: Vec<(Rule, Option<u64>)>,
}

impl Model {
    fn is_in_set(&self, rule: &Rule) -> bool {
        self.sets && rule.template().is_some()
    }

    /// Carries out a change that was acknowledged, and returns what the response should say.
    fn apply(&mut self, change: &Change, expires: Option<u64>) -> Tally {
        let mut tally = Tally::default();
        tally.add(Verdict::Deleted, self.remove(|rule| is_deleted(change, rule)));
        for rule in change.rules.iter() {
            if change.action == Action::DeleteAnyTag {
                let deleted = self.remove(|known| rule == Rule { tag: rule.tag, ..*known });
                tally.add(Verdict::Deleted, deleted);
                tally.add(Verdict::Absent, usize::from(deleted == 0));
                continue;
            }
            let known = self.rules.iter().position(|(known, _)| *known == rule);
            let verdict = match (change.action, known) {
                (Action::Delete | Action::DeleteAnyTag, None) => Verdict::Absent,
                (Action::Delete | Action::DeleteAnyTag, Some(at)) => {
                    self.rules.remove(at);
                    Verdict::Deleted
                }
                (Action::Put(_) | Action::Replace(_), Some(at)) if self.is_right(at, expires) => {
                    Verdict::Exists
                }
                (Action::Put(_) | Action::Replace(_), _) => {
                    self.put(rule, expires);
                    if known.is_some() { Verdict::Refreshed } else { Verdict::Inserted }
                }
            };
            tally.add(verdict, 1);
        }
        tally
    }

    fn remove(&mut self, is_gone: impl Fn(&Rule) -> bool) -> usize {
        let count = self.rules.len();
        self.rules.retain(|(rule, _)| !is_gone(rule));
        count - self.rules.len()
    }

    /// With sets, an address keeps its newest target.
    fn set_sets(&mut self, sets: bool) {
        self.sets = sets;
        for (rule, expires) in mem::take(&mut self.rules) {
            self.put(rule, expires);
        }
    }

    fn put(&mut self, rule: Rule, expires: Option<u64>) {
        let is_in_set = self.is_in_set(&rule);
        let is_replaced = |known: &Rule| {
            let is_rival = (known.matches, known.tag) == (rule.matches, rule.tag);
            is_rival && is_in_set || *known == rule
        };
        self.rules.retain(|(known, _)| !is_replaced(known));
        self.rules.push((rule, expires));
    }

    /// Whether a rule has that expiry and decides about its packets.
    fn is_right(&self, at: usize, expires: Option<u64>) -> bool {
        let (rule, old) = self.rules[at];
        let decides = |(newer, _): &(Rule, _)| may_shadow(newer, &rule);
        old == expires && (self.is_in_set(&rule) || !self.rules[at + 1..].iter().any(decides))
    }

    fn expire(&mut self, family: Family, now: u64) {
        let is_due = |expires: &Option<u64>| expires.is_some_and(|second| second <= now);
        self.rules.retain(|(rule, expires)| rule.family() != family || !is_due(expires));
    }
}

// ---------------------------------------------------------------------------------------------
// The world: kernel, engine, state file, model

const MAXELEM: usize = 6;
/// That of sets, in seconds.
const TOLERANCE: u64 = 3;
const PORT: u16 = 7393;

fn whitelist() -> Whitelist {
    Whitelist::parse("192.0.2.1\n2001:db8:ffff::1").unwrap()
}

fn directory() -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // In memory if possible: a disk needs milliseconds for each of many fsyncs.
    let shm = PathBuf::from("/dev/shm");
    let parent = if shm.is_dir() { shm } else { std::env::temp_dir() };
    let directory = parent.join(format!("rfw-engine-{}-{number}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    directory
}

struct World {
    kernel: FakeKernel,
    engine: Option<Engine<FakeKernel>>,
    model: Model,
    directory: Option<PathBuf>,
    metrics: Arc<Metrics>,
    /// Every second start reads two listings at once.
    starts: usize,
    /// The foreign rules, which must not change.
    foreign: BTreeMap<(Family, Chain), Vec<String>>,
    /// Since the last time that everything agreed: whether other programs changed rfw's rules, and
    /// the changes that were refused, of which the kernel may still hold a part.
    is_damaged: bool,
    refused: Vec<Match>,
    /// The steps of a random sequence.
    trace: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.directory.iter().for_each(|directory| fs::remove_dir_all(directory).unwrap());
    }
}

impl World {
    fn new(sets: bool, has_file: bool) -> World {
        let mut world = World {
            kernel: FakeKernel::default(),
            engine: None,
            model: Model { sets, rules: Vec::new() },
            directory: has_file.then(directory),
            metrics: Arc::default(),
            starts: 0,
            foreign: BTreeMap::new(),
            is_damaged: false,
            refused: Vec::new(),
            trace: Vec::new(),
        };
        assert!(world.start().is_ok());
        world
    }

    fn start(&mut self) -> Result<(), String> {
        self.engine = None;
        self.starts += 1;
        let open = |directory: &PathBuf| StateFile::open(&directory.join("state"));
        let state = self
            .directory
            .as_ref()
            .map(|directory| open(directory).map_err(|e| e.message).unwrap());
        let whitelist = whitelist();
        let guards = Family::ALL.iter().flat_map(|f| guards(&whitelist, *f, PORT)).collect();
        let max_edits = self.memory().max_edits.unwrap_or(usize::MAX);
        let sets = self.model.sets.then_some(MAXELEM);
        let reads_at_once = self.starts.is_multiple_of(2);
        let max_deletions = if self.starts.is_multiple_of(3) { 2 } else { usize::MAX };
        let settings = Settings { guards, sets, max_edits, max_deletions, reads_at_once };
        let log = Arc::new(Log::default());
        let metrics = self.metrics.clone();
        let engine = start::start(self.kernel.clone(), state, settings, &whitelist, log, metrics);
        self.engine = Some(engine?);
        Ok(())
    }

    fn engine(&mut self) -> &mut Engine<FakeKernel> {
        self.engine.as_mut().unwrap()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.kernel.lock()
    }

    fn chain(&self, family: Family, chain: Chain) -> Vec<FakeRow> {
        self.memory().chain(family, chain).clone()
    }

    /// From the next call on.
    fn set_faults(&self, faults: &[Fault]) {
        let mut memory = self.memory();
        (memory.calls, memory.faults) = (Vec::new(), faults.to_vec());
    }

    /// Inserts a foreign rule; number 1 is the front.
    fn insert_foreign(&mut self, family: Family, chain: Chain, number: usize, line: &str) {
        let mut memory = self.kernel.lock();
        let rows = memory.chain(family, chain);
        rows.insert((number - 1).min(rows.len()), FakeRow::Foreign(line.into()));
        drop(memory);
        self.foreign = self.foreign_rows();
    }

    fn foreign_rows(&self) -> BTreeMap<(Family, Chain), Vec<String>> {
        let line = |row: &FakeRow| match row {
            FakeRow::Foreign(line) => Some(line.clone()),
            FakeRow::Own(_) => None,
        };
        let memory = self.memory();
        let lines = |rows: &Vec<FakeRow>| rows.iter().filter_map(line).collect::<Vec<_>>();
        let chains = memory.chains.iter().map(|(key, rows)| (*key, lines(rows)));
        chains.filter(|(_, lines)| !lines.is_empty()).collect()
    }

    /// Commits one batch and checks each response.
    fn commit(&mut self, changes: &[Change]) -> Vec<Result<Outcome, ApiError>> {
        let results = self.engine().commit(changes);
        self.follow(changes, &results);
        let (made, refused): (Vec<_>, Vec<_>) =
            changes.iter().zip(&results).partition(|(_, result)| result.is_ok());
        for (change, _) in refused {
            self.refused.extend(change.rules.iter().map(|rule| rule.matches));
            let gone = self.model.rules.iter().filter(|(rule, _)| is_deleted(change, rule));
            self.refused.extend(gone.map(|(rule, _)| rule.matches));
        }
        made.iter().for_each(|(change, _)| self.check_in_effect(change));
        if results.iter().all(Result::is_ok) && !self.is_damaged {
            self.check_guards_first();
        }
        assert_eq!(self.foreign_rows(), self.foreign, "other people's rules");
        results
    }

    /// Applies acknowledged changes to the model. Rules that were due may have been deleted or, if
    /// that failed, not.
    fn follow(&mut self, changes: &[Change], results: &[Result<Outcome, ApiError>]) {
        let stored: Vec<_> = self.engine().list.stored().collect();
        let now = clock::wall().as_secs();
        for due in [&Family::ALL[..], &[], &[Family::V4], &[Family::V6]] {
            let mut model = self.model.clone();
            due.iter().for_each(|family| model.expire(*family, now));
            let mut is_right = true;
            for family in [Some(Family::V4), Some(Family::V6), None] {
                let own = changes.iter().zip(results).filter(|(c, _)| c.family() == family);
                for (change, outcome) in own.filter_map(|(c, r)| Some((c, r.as_ref().ok()?))) {
                    is_right &= model.apply(change, outcome.expires) == outcome.tally;
                }
            }
            if is_right && model.rules == stored {
                self.model = model;
                return;
            }
        }
        panic!(
            "{results:?} for {changes:?}\nafter {}\nlist  {}",
            shown(&self.model.rules),
            shown(&stored)
        );
    }

    /// Commits changes without faults, each in its own batch.
    fn put(&mut self, text: &str) {
        for batch in parse(text) {
            for result in self.commit(&batch) {
                assert!(result.is_ok(), "{text}: {result:?}");
            }
        }
    }

    fn check_list(&mut self) {
        let stored: Vec<_> = self.engine().list.stored().collect();
        let (list, model) = (shown(&stored), shown(&self.model.rules));
        assert_eq!(list, model, "the list is not what was acknowledged");
    }

    /// Checks that an acknowledged change is in effect, unless a refused one for the same packets
    /// still is in part.
    fn check_in_effect(&self, change: &Change) {
        let enforced = self.enforced();
        for rule in change.rules.iter().filter(|rule| !self.refused.contains(&rule.matches)) {
            let wanted = self.model.rules.iter().find(|(known, _)| *known == rule);
            let mut found = enforced.iter().filter(|(known, _)| *known == rule);
            match wanted {
                Some((_, wanted)) => {
                    let is_found = found.any(|(_, expires)| is_near(*wanted, *expires));
                    assert!(is_found, "{rule} {wanted:?} is not in effect: {}", shown(&enforced));
                    let rows = self.chain(rule.family(), rule.chain());
                    let set = rule.template().map(|(template, _)| template);
                    let is_it = |row: &FakeRow| matches!(row, FakeRow::Own(t) if t.rule.rule == rule || set.is_some() && t.rule.template() == set);
                    let before = rows.iter().take_while(|row| !is_it(row));
                    let foreign = before.filter(|row| matches!(row, FakeRow::Foreign(_)));
                    assert_eq!(foreign.count(), 0, "{rule} is behind foreign rules: {rows:#?}");
                }
                None => assert!(self.is_damaged || found.count() == 0, "{rule} is in effect"),
            }
        }
    }

    /// The rules of rfw that the kernel enforces, chain by chain from the front, with expiries.
    fn enforced(&self) -> Vec<(Rule, Option<u64>)> {
        let memory = self.memory();
        let mut rules = Vec::new();
        for row in memory.chains.values().flatten() {
            let FakeRow::Own(TaggedRule { rule, expires, .. }) = row else { continue };
            match (rule.kind, rule.template()) {
                (_, Some(template)) => {
                    let set = &memory.sets[&rule.to_string()];
                    let rule =
                        |(net, expires): (&Net, &Option<u64>)| (template.rule(*net), *expires);
                    let now = clock::wall().as_secs() + TOLERANCE;
                    let live = |(_, expires): &(&Net, &Option<u64>)| {
                        expires.is_none_or(|second| second > now)
                    };
                    rules.extend(set.entries.iter().filter(live).map(rule));
                }
                (RuleKind::Guard(_), _) => {}
                _ => rules.push((rule.rule, *expires)),
            }
        }
        rules
    }

    /// Checks that no ACCEPT rule precedes a guard rule.
    fn check_guards_first(&self) {
        for ((family, chain), rows) in &self.memory().chains {
            let own = rows.iter().filter_map(|row| match row {
                FakeRow::Own(tagged) => Some(tagged.rule),
                FakeRow::Foreign(_) => None,
            });
            let behind: Vec<_> =
                own.skip_while(|rule| matches!(rule.kind, RuleKind::Guard(_))).collect();
            let last = behind.iter().rposition(|rule| matches!(rule.kind, RuleKind::Guard(_)));
            let accepts = behind.iter().take(last.unwrap_or(0));
            let accepts = accepts.filter(|rule| rule.rule.target == Target::Accept);
            let accepts: Vec<_> =
                accepts.filter(|rule| !matches!(rule.kind, RuleKind::Guard(_))).collect();
            assert!(accepts.is_empty(), "{family} {chain:?}: {accepts:?} before the guards");
        }
    }

    /// The calls since the faults were set, IPv4 and then IPv6. r and w: rules are read and written,
    /// R and W: sets; sorted.
    fn cost(&self) -> String {
        let letter = |(part, call): &(Part, Call)| match (part, call) {
            (Part::Rules(family), Call::Read) => (*family, 'r'),
            (Part::Rules(family), _) => (*family, 'w'),
            (Part::Sets, Call::Read) => (Family::V4, 'R'),
            (Part::Sets, _) => (Family::V4, 'W'),
        };
        let mut letters: Vec<_> = self.memory().calls.iter().map(letter).collect();
        letters.sort_unstable();
        let of = |family| letters.iter().filter(move |(known, _)| *known == family);
        let of = |family| of(family).map(|(_, letter)| *letter).collect::<String>();
        format!("{} {}", of(Family::V4), of(Family::V6)).trim_end().into()
    }

    /// A tick that checks everything. Returns whether it failed.
    fn tick(&mut self) -> bool {
        let engine = self.engine();
        (engine.next_check, engine.next_sets_check) = (Instant::now(), Instant::now());
        let has_failed = engine.tick().is_some() || engine.outage.is_some();
        self.follow(&[], &[]);
        has_failed
    }

    /// Lets the engine tick until it trusts the kernel and neither writes nor fails.
    fn settle(&mut self) {
        for _ in 0..20 {
            let writes = self.memory().writes();
            self.engine().overtaken.clear();
            let was_trusted = self.engine().distrusted.is_empty();
            if !self.tick() && was_trusted && self.memory().writes() == writes {
                (self.is_damaged, self.refused) = (false, Vec::new());
                return self.check();
            }
        }
        panic!("never quiet: {:?}", self.engine().outage);
    }

    /// Checks that list, kernel and state file hold what was acknowledged.
    fn check(&mut self) {
        Family::ALL.iter().for_each(|family| self.model.expire(*family, clock::wall().as_secs()));
        self.check_list();
        self.check_kernel();
        self.check_file();
    }

    fn check_kernel(&mut self) {
        assert_eq!(self.foreign_rows(), self.foreign, "other people's rules");
        for family in Family::ALL {
            for chain in Chain::ALL {
                let rows = self.chain(family, chain);
                let key = |row: &FakeRow| match row {
                    FakeRow::Own(tagged) => Some(tagged.key()),
                    FakeRow::Foreign(_) => None,
                };
                let wanted: Vec<_> = self.engine().wanted(family, chain).collect();
                let front = rows.iter().map_while(key);
                assert!(
                    front.eq(wanted.iter().map(TaggedRule::key)),
                    "{family} {chain:?}: {rows:#?} are not {wanted:#?}"
                );
                let count = rows.iter().filter_map(key).count();
                assert_eq!(count, wanted.len(), "rfw's rules among others: {rows:#?}");
            }
        }
        self.check_guards_first();
        // Rules that are about to expire need not be repaired.
        let now = clock::wall().as_secs() + TOLERANCE;
        for (rule, _, members) in self.engine.as_ref().unwrap().list.sets() {
            let memory = self.kernel.lock();
            let Some(set) = memory.sets.get(&rule.to_string()) else { panic!("{rule} is missing") };
            let wanted: Vec<_> = members.iter().map(|(net, e)| (*net, e.expires())).collect();
            let found = set.entries.iter().filter(|(_, e)| e.is_none_or(|second| second > now));
            let found: Vec<_> = found.map(|(net, expires)| (*net, *expires)).collect();
            let nets =
                |entries: &[(Net, _)]| entries.iter().map(|(net, _)| *net).collect::<Vec<_>>();
            assert_eq!(nets(&found), nets(&wanted), "{rule}");
            let near = found.iter().zip(&wanted).all(|((_, a), (_, b))| is_near(*a, *b));
            assert!(near, "{rule}: {found:?} {wanted:?}");
        }
        let mut enforced = self.enforced();
        let mut wanted = self.model.rules.clone();
        enforced.sort_unstable_by_key(|(rule, _)| *rule);
        wanted.sort_unstable_by_key(|(rule, _)| *rule);
        let rules = |all: &[(Rule, _)]| all.iter().map(|(rule, _)| *rule).collect::<Vec<_>>();
        assert_eq!(rules(&enforced), rules(&wanted), "the kernel enforces what was acknowledged");
        // GET /list shows the same.
        let faults = mem::take(&mut self.memory().faults);
        let listed = self.engine().listing(&Filter::default()).unwrap();
        self.memory().faults = faults;
        let own: usize = Family::ALL
            .iter()
            .flat_map(|family| Chain::ALL.map(|chain| self.chain(*family, chain)))
            .flatten()
            .filter(
                |row| matches!(row, FakeRow::Own(t) if !matches!(t.rule.kind, RuleKind::Guard(_))),
            )
            .count();
        assert_eq!(listed.len(), own);
    }

    /// Checks that replaying the state file gives the list.
    fn check_file(&mut self) {
        let Some(directory) = &self.directory else { return };
        let copy = directory.join("copy");
        fs::copy(directory.join("state"), &copy).unwrap();
        let mut state = StateFile::open(&copy).map_err(|e| e.message).unwrap();
        let mut list = List::new(self.model.sets.then_some(MAXELEM));
        let replayed = state.replay(|record| match record {
            Record::Put(rule, expires) => list.insert(&rule, expires),
            Record::Delete(rule) => list.remove(&rule),
        });
        assert!(replayed.map_err(|e| e.message).unwrap().tail.is_none());
        let now = clock::wall().as_secs();
        Family::ALL.iter().for_each(|family| drop(list.expire(*family, now)));
        let stored: Vec<_> = list.stored().collect();
        let (file, model) = (shown(&stored), shown(&self.model.rules));
        assert_eq!(file, model, "the state file is not what was acknowledged");
    }

    /// Starts, from the state file or the kernel, until a start succeeds.
    fn restart(&mut self) {
        let mut last = String::new();
        for _ in 0..20 {
            match self.start() {
                Ok(()) => return,
                Err(message) => last = message,
            }
        }
        panic!("does not start: {last}");
    }

    /// Restarts, perhaps with sets instead of rules, and removes from the model what that may lose:
    /// with a state file, nothing; without one, rules that others removed, or a part of a refused
    /// change.
    fn restart_with(&mut self, sets: bool) {
        let now = clock::wall().as_secs();
        Family::ALL.iter().for_each(|family| self.model.expire(*family, now));
        self.model.set_sets(sets);
        self.restart();
        let stored: Vec<_> = self.engine().list.stored().collect();
        if self.directory.is_none() {
            let is_sure = |rule: &Rule| !self.is_damaged && !self.refused.contains(&rule.matches);
            for (a, b) in [(&self.model.rules, &stored), (&stored, &self.model.rules)] {
                for (rule, expires) in a.iter().filter(|(rule, _)| is_sure(rule)) {
                    let same =
                        |(other, second): &(Rule, _)| other == rule && is_near(*expires, *second);
                    let (model, list) = (shown(&self.model.rules), shown(&stored));
                    assert!(b.iter().any(same), "{rule}: model {model}, list {list}");
                }
            }
            self.model.rules = stored;
        }
        self.check_list();
    }

    /// Restarts while everything agrees.
    fn check_restart(&mut self) {
        self.restart_with(self.model.sets);
        self.check();
    }

    /// Lets time pass, by making every expiry in the list, the kernel and on the disk earlier.
    fn pass(&mut self, seconds: u64) {
        let earlier = |expires: Option<u64>| expires.map(|second| second.saturating_sub(seconds));
        let engine = self.engine.as_mut().unwrap();
        engine.list.shift(clock::wall().as_secs(), -i64::try_from(seconds).unwrap());
        self.model.rules.iter_mut().for_each(|(_, expires)| *expires = earlier(*expires));
        let mut memory = self.kernel.lock();
        for row in memory.chains.values_mut().flatten() {
            if let FakeRow::Own(tagged) = row {
                tagged.expires = earlier(tagged.expires);
            }
        }
        for set in memory.sets.values_mut() {
            set.entries.values_mut().for_each(|expires| *expires = earlier(*expires));
        }
        drop(memory);
        // In place, because the engine has it open: all numbers have ten digits.
        let Some(directory) = &self.directory else { return };
        let path = directory.join("state");
        let text = fs::read_to_string(&path).unwrap();
        let line = |line: &str| match line.split(' ').collect::<Vec<_>>()[..] {
            ["+", second, path] if second != "0" => {
                let second = earlier(second.parse().ok()).unwrap();
                format!("+ {second:010} {path}\n")
            }
            _ => format!("{line}\n"),
        };
        let shifted: String = text.lines().map(line).collect();
        assert_eq!(shifted.len(), text.len());
        fs::write(&path, shifted).unwrap();
    }
}

/// Whether a change deletes a rule without naming it.
fn is_deleted(change: &Change, rule: &Rule) -> bool {
    match (&change.rules, change.action) {
        (Rules::Tagged(tag, chain), _) => {
            rule.tag == *tag && chain.is_none_or(|chain| chain == rule.chain())
        }
        (Rules::List(template, nets), Action::Replace(_)) => {
            rule.template().is_some_and(|(t, net)| t == *template && !nets.contains(&net))
        }
        _ => false,
    }
}

fn shown(rules: &[(Rule, Option<u64>)]) -> String {
    let shown = |(rule, expires): &(Rule, Option<u64>)| format!("{rule} {}", expires.unwrap_or(0));
    rules.iter().map(shown).collect::<Vec<_>>().join(", ")
}

/// Whether expiries are the same, except for the parts of a second that sets and lists do not show.
fn is_near(a: Option<u64>, b: Option<u64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.abs_diff(b) <= 4,
        _ => a == b,
    }
}

/// Batches separated by `;`, their changes by `,`. A change is `+ PATH`, `+60 PATH` with an
/// expiry, `- PATH`, `! PATH` whatever the tag, or a list: `+ /drop/input/any: ADDRESS ADDRESS`, with
/// a tag `+ /drop/input/any@TAG: ADDRESS`, `=` if it replaces. `- @TAG` deletes all with a tag.
fn parse(text: &str) -> Vec<Vec<Change>> {
    let batches = text.split(';').map(str::trim).filter(|batch| !batch.is_empty());
    batches
        .map(|batch| batch.split(',').map(|change| parse_change(change.trim())).collect())
        .collect()
}

fn parse_change(text: &str) -> Change {
    let (verb, object) = text.split_once(' ').unwrap();
    let action = match verb {
        "-" => Action::Delete,
        "!" => Action::DeleteAnyTag,
        _ if verb.starts_with('=') => Action::Replace(verb[1..].parse().unwrap_or(0)),
        _ => Action::Put(verb[1..].parse().unwrap_or(0)),
    };
    let rules = match object.split_once(": ") {
        None if object.starts_with('@') => Rules::Tagged(Tag::parse(&object[1..]).unwrap(), None),
        None => Rules::One(object.parse().unwrap()),
        Some((template, nets)) => {
            let (template, tag) = Tag::split(template).unwrap();
            let segments: Vec<&str> = template.split('/').skip(1).collect();
            let template = RuleTemplate { tag, ..RuleTemplate::parse(&segments).unwrap() };
            let mut nets: Vec<Net> = nets.split(' ').map(|net| Net::parse(net).unwrap()).collect();
            nets.sort_unstable();
            Rules::List(template, nets)
        }
    };
    Change { rules, action }
}

// ---------------------------------------------------------------------------------------------
// Every fault at every step

type Damage = fn(&mut World);

struct Scenario {
    name: &'static str,
    sets: bool,
    before: &'static str,
    /// Happens to the kernel before the changes.
    damage: Damage,
    changes: &'static str,
    /// An address that the kernel always rejects.
    bad: Option<&'static str>,
}

fn none(_: &mut World) {}

fn flush(world: &mut World) {
    world.memory().chains.clear();
    world.foreign.clear();
}

fn flush_and_destroy(world: &mut World) {
    flush(world);
    world.memory().sets.clear();
}

fn empty_sets(world: &mut World) {
    world.memory().sets.values_mut().for_each(|set| set.entries.clear());
}

fn overtake(world: &mut World) {
    world.insert_foreign(Family::V4, Chain::Input, 1, "-j ACCEPT");
    world.insert_foreign(Family::V4, Chain::Input, 4, "-j DOCKER");
}

fn minutes_pass(world: &mut World) {
    world.pass(120);
}

const fn rules(name: &'static str, before: &'static str, changes: &'static str) -> Scenario {
    Scenario { name, sets: false, before, damage: none, changes, bad: None }
}

const fn sets(name: &'static str, before: &'static str, changes: &'static str) -> Scenario {
    Scenario { sets: true, ..rules(name, before, changes) }
}

const fn after(damage: Damage, scenario: Scenario) -> Scenario {
    Scenario { damage, ..scenario }
}

const fn with_bad(bad: &'static str, scenario: Scenario) -> Scenario {
    Scenario { bad: Some(bad), ..scenario }
}

fn scenarios() -> Vec<Scenario> {
    let two = "+ /drop/input/any/1.1.1.1; +600 /drop/input/eth0/2.2.2.2";
    let in_sets = "+ /drop/input/any/1.1.1.1; +600 /drop/input/any/2.2.2.2; \
                   + /accept/forward/eth0/3.3.3.3/eth1/4.4.4.4";
    let lists = "+ /drop/input/any: 1.1.1.1 2.2.2.2 2001:db8::1 2001:db8::2";
    let due = "+60 /drop/input/any/1.1.1.1; +600 /drop/input/any/2.2.2.2; \
               +60 /drop/input/any/2001:db8::1";
    let tags = "+ /drop/input/any: 1.1.1.1 2.2.2.2; + /drop/input/any@a: 1.1.1.1 3.3.3.3 2001:db8::1; \
                + /accept/output/any/1.1.1.1@a";
    vec![
        rules("tag", tags, "+60 /drop/input/any/1.1.1.1@b"),
        rules("tag replaced", tags, "= /drop/input/any@a: 2.2.2.2 3.3.3.3"),
        rules("tag deleted", tags, "- @a"),
        rules("any tag deleted", tags, "! /drop/input/any: 1.1.1.1 2.2.2.2"),
        sets("tag in sets", tags, "+60 /drop/input/any/1.1.1.1@b"),
        sets("tag replaced in sets", tags, "= /drop/input/any@a: 2.2.2.2 3.3.3.3"),
        sets("tag deleted in sets", tags, "- @a"),
        sets("any tag deleted in sets", tags, "! /drop/input/any/1.1.1.1"),
        rules("first", "", "+ /drop/input/any/1.1.1.1"),
        rules("put", two, "+60 /reject/output/any/5.5.5.5"),
        rules("accept", two, "+ /accept/input/any/5.5.5.5"),
        rules("delete", two, "- /drop/input/any/1.1.1.1"),
        rules(
            "delete the last of a group and put another",
            two,
            "- /drop/input/any/1.1.1.1, + /drop/input/any/5.5.5.5",
        ),
        rules("refresh", two, "+ /drop/input/eth0/2.2.2.2"),
        rules("exists", two, "+ /drop/input/any/1.1.1.1"),
        rules("absent", two, "- /drop/input/any/5.5.5.5"),
        rules(
            "shadowed",
            "+ /accept/input/any/1.1.1.1; + /drop/input/any/1.1.1.0/24",
            "+ /accept/input/any/1.1.1.1",
        ),
        rules(
            "batch",
            two,
            "+ /drop/input/any/5.5.5.5, - /drop/input/any/1.1.1.1, \
            + /drop/input/any/2001:db8::5, + /drop/input/any/5.5.5.5, + /drop/forward/any/6.6.6.6",
        ),
        with_bad(
            "7.7.7.7",
            rules(
                "one of a batch is bad",
                two,
                "- /drop/input/any/1.1.1.1, + /drop/input/any/7.7.7.7, \
             + /drop/input/any/5.5.5.5, +60 /drop/input/any/6.6.6.6",
            ),
        ),
        with_bad("7.7.7.7", rules("bad", two, "+ /drop/input/any/7.7.7.7")),
        rules("list", two, "+ /drop/input/any: 1.1.1.1 5.5.5.5 2001:db8::1"),
        rules("list again", lists, "+ /drop/input/any: 1.1.1.1 2.2.2.2 2001:db8::1 2001:db8::2"),
        rules(
            "list with a new expiry",
            lists,
            "+60 /drop/input/any: 1.1.1.1 2.2.2.2 2001:db8::1 2001:db8::2",
        ),
        rules("list deleted", lists, "- /drop/input/any: 1.1.1.1 5.5.5.5 2001:db8::2"),
        with_bad(
            "2001:db8::7",
            rules(
                "list with a bad address",
                lists,
                "+60 /drop/input/any: 1.1.1.1 5.5.5.5 2001:db8::7",
            ),
        ),
        after(flush, rules("put after a flush", two, "+ /drop/input/any/5.5.5.5")),
        after(flush, rules("exists after a flush", two, "+ /drop/input/any/1.1.1.1")),
        after(flush, rules("delete after a flush", two, "- /drop/input/any/1.1.1.1")),
        after(overtake, rules("put behind others", two, "+ /accept/input/any/5.5.5.5")),
        after(overtake, rules("exists behind others", two, "+ /drop/input/any/1.1.1.1")),
        after(minutes_pass, rules("expiry", due, "+ /drop/input/any/5.5.5.5")),
        after(minutes_pass, rules("put of what is due", due, "+60 /drop/input/any/1.1.1.1")),
        sets("first in a set", "", "+ /drop/input/any/1.1.1.1"),
        sets("put in a set", in_sets, "+60 /drop/input/any/5.5.5.5"),
        sets("new set", in_sets, "+60 /reject/output/any/5.5.5.5"),
        sets("delete from a set", in_sets, "- /drop/input/any/1.1.1.1"),
        sets("refresh in a set", in_sets, "+ /drop/input/any/2.2.2.2"),
        sets("exists in a set", in_sets, "+ /drop/input/any/1.1.1.1"),
        sets("move to a new set", in_sets, "+60 /accept/input/any/1.1.1.1"),
        sets(
            "move back",
            "+ /drop/input/any/1.1.1.1; + /accept/input/any/1.1.1.1",
            "+ /drop/input/any/1.1.1.1",
        ),
        sets("two addresses", in_sets, "+60 /drop/forward/any/5.5.5.5/any/6.6.6.6"),
        sets("delete two addresses", in_sets, "- /accept/forward/eth0/3.3.3.3/eth1/4.4.4.4"),
        sets(
            "batch in sets",
            in_sets,
            "+ /drop/input/any/5.5.5.5, - /drop/input/any/1.1.1.1, \
            + /drop/input/any/2001:db8::5, + /accept/input/any/5.5.5.5, \
            + /drop/forward/any/5.5.5.5/any/6.6.6.6",
        ),
        with_bad(
            "7.7.7.7",
            sets(
                "one of a batch in sets is bad",
                in_sets,
                "- /drop/input/any/1.1.1.1, + /reject/input/any/7.7.7.7, \
             + /drop/input/any/5.5.5.5, + /reject/input/any/2.2.2.2",
            ),
        ),
        sets("list in sets", in_sets, "+60 /drop/input/any: 1.1.1.1 5.5.5.5 2001:db8::1"),
        sets("list moves", lists, "+60 /accept/input/any: 1.1.1.1 2.2.2.2 2001:db8::1"),
        with_bad(
            "2.2.2.7",
            sets(
                "list with a bad address in sets",
                lists,
                "+60 /accept/input/any: 1.1.1.1 2.2.2.2 2.2.2.7 2001:db8::1",
            ),
        ),
        sets("list deleted from sets", lists, "- /drop/input/any: 1.1.1.1 5.5.5.5 2001:db8::2"),
        sets(
            "full set",
            "+ /drop/input/any: 1.1.1.1 1.1.1.2 1.1.1.3 1.1.1.4 1.1.1.5",
            "+ /drop/input/any/1.1.1.6, + /drop/input/any/1.1.1.7, - /drop/input/any/1.1.1.1",
        ),
        sets(
            "full list",
            "+ /drop/input/any: 1.1.1.1 1.1.1.2 1.1.1.3",
            "+60 /drop/input/any: 1.1.1.3 1.1.1.4 1.1.1.5 1.1.1.6 1.1.1.7",
        ),
        after(flush, sets("put in a set after a flush", in_sets, "+ /drop/input/any/5.5.5.5")),
        after(
            flush_and_destroy,
            sets("put in a set that was destroyed", in_sets, "+ /drop/input/any/5.5.5.5"),
        ),
        after(
            flush_and_destroy,
            sets(
                "two sets of one family destroyed at once",
                "+ /drop/input/any/1.1.1.1; + /accept/output/any/2.2.2.2",
                "- /drop/input/any/1.1.1.1",
            ),
        ),
        after(
            empty_sets,
            sets("exists in a set that was emptied", in_sets, "+ /drop/input/any/1.1.1.1"),
        ),
        after(
            empty_sets,
            sets("move from a set that was emptied", in_sets, "+ /accept/input/any/1.1.1.1"),
        ),
        after(overtake, sets("put in a set behind others", in_sets, "+ /drop/input/any/5.5.5.5")),
        after(minutes_pass, sets("expiry in sets", due, "+ /drop/input/any/5.5.5.5")),
        after(
            minutes_pass,
            sets("put of what is due in sets", due, "+60 /accept/input/any/1.1.1.1"),
        ),
    ]
}

impl Scenario {
    fn world(&self, has_file: bool) -> World {
        let mut world = World::new(self.sets, has_file);
        world.insert_foreign(Family::V4, Chain::Input, 99, "-s 9.9.9.9 -j ACCEPT");
        world.insert_foreign(Family::V6, Chain::Input, 99, "-p icmpv6 -j ACCEPT");
        world.put(self.before);
        world.settle();
        (self.damage)(&mut world);
        world.memory().bad = self.bad.map(|net| Net::parse(net).unwrap());
        world
    }

    /// The calls of the changes and of the next check.
    fn run(&self, has_file: bool, faults: &[Fault]) -> Vec<(Part, Call)> {
        let mut world = self.world(has_file);
        world.set_faults(faults);
        for batch in parse(self.changes) {
            world.commit(&batch);
        }
        world.tick();
        let calls = world.memory().calls.clone();
        world.settle();
        if faults.is_empty() {
            world.check_restart();
        }
        calls
    }
}

/// Every call fails in every way, once, and several times in a row, alone or with the other parts.
fn faults_of(calls: &[(Part, Call)], only_writes: bool) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (number, (part, call)) in calls.iter().enumerate() {
        if only_writes && *call == Call::Read {
            continue;
        }
        let first = 1 + calls[..number].iter().filter(|(known, _)| known == part).count();
        let alone = |fault| Fault { part: Some(*part), ..fault };
        faults.extend(call.ways().iter().map(|way| alone(Fault::new(first, 1, *way))));
        let often = [Way::Reject, Way::DoAndInterrupt, Way::PartAndReject(1)];
        for way in often.into_iter().take(if *call == Call::Read { 1 } else { 3 }) {
            faults.extend([alone(Fault::new(first, 3, way)), Fault::new(first, 7, way)]);
        }
    }
    faults
}

fn check_scenarios(sets: bool, has_file: bool) {
    let mut failed = Vec::new();
    for scenario in scenarios().iter().filter(|scenario| scenario.sets == sets) {
        let calls = scenario.run(has_file, &[]);
        // Reads do not depend on the file.
        for fault in faults_of(&calls, has_file) {
            let run = panic::catch_unwind(|| scenario.run(has_file, &[fault]));
            if run.is_err() {
                failed.push(format!("{}: {fault:?}", scenario.name));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}

#[test]
fn every_fault_at_every_step_with_rules() {
    check_scenarios(false, false);
}

#[test]
fn every_fault_at_every_step_with_rules_and_state_file() {
    check_scenarios(false, true);
}

#[test]
fn every_fault_at_every_step_with_sets() {
    check_scenarios(true, false);
}

#[test]
fn every_fault_at_every_step_with_sets_and_state_file() {
    check_scenarios(true, true);
}

/// A start that fails, or that ends halfway, loses nothing; nor does one in the other form.
#[test]
fn every_fault_at_every_step_of_a_start() {
    let before = "+ /accept/input/any/1.1.1.1; +600 /drop/input/any/1.1.1.0/24; \
                  + /drop/output/eth0/2001:db8::1; + /drop/forward/any/1.1.1.1/any/2.2.2.2";
    for (sets, then) in [(false, false), (true, true), (false, true), (true, false)] {
        for has_file in [false, true] {
            let run = |faults: &[Fault]| {
                let mut world = World::new(sets, has_file);
                world.insert_foreign(Family::V4, Chain::Input, 99, "-s 9.9.9.9 -j ACCEPT");
                world.put(before);
                world.set_faults(faults);
                world.restart_with(then);
                let calls = mem::take(&mut world.memory().calls);
                world.settle();
                calls
            };
            for fault in faults_of(&run(&[]), has_file) {
                run(&[fault]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// One test for each defect

fn verdict(result: &Result<Outcome, ApiError>) -> Result<Verdict, &ApiError> {
    result.as_ref().map(|outcome| outcome.tally.single().unwrap())
}

/// The error after which rfw answered 500 while the rule remained.
#[test]
fn committed_then_exit_1() {
    for way in [Way::DoAndReject, Way::DoAndInterrupt] {
        let mut world = World::new(false, true);
        world.set_faults(&[Fault::new(1, 1, way)]);
        let results = world.commit(&parse("+ /drop/input/any/1.1.1.1")[0]);
        assert_eq!(verdict(&results[0]), Ok(Verdict::Inserted), "{way:?}");
        world.check();
        // The half of a list for IPv6 is committed, and nothing can be read after that.
        let list = &parse("+ /drop/input/any: 1.1.1.2 2001:db8::2")[0];
        let half = Fault { part: Some(Part::Rules(Family::V6)), ..Fault::new(1, 1, way) };
        world.set_faults(&[half, Fault::new(2, 20, Way::Reject)]);
        assert!(world.commit(list)[0].is_err());
        world.set_faults(&[]);
        let results = world.commit(&parse("- /drop/input/any/2001:db8::2")[0]);
        assert_eq!(verdict(&results[0]), Ok(Verdict::Absent));
        assert!(!shown(&world.enforced()).contains("2001:db8::2"));
        world.put("+ /drop/input/any: 1.1.1.2 2001:db8::2");
        world.settle();
    }
}

/// A batch that the kernel rejects is attempted in halves; after a transient failure it is not.
#[test]
fn a_bad_rule_fails_alone() {
    for (sets, has_file) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut world = World::new(sets, has_file);
        world.memory().bad = Net::parse("1.1.1.2");
        let changes = (1..6).map(|number| format!("+ /drop/input/any/1.1.1.{number}"));
        let changes = parse(&changes.collect::<Vec<_>>().join(", ")).remove(0);
        let results = world.commit(&changes);
        let is_made = results.iter().map(|result| result.is_ok()).collect::<Vec<_>>();
        assert_eq!(is_made, [true, false, true, true, true]);
        assert!(matches!(results[1], Err(ApiError::Iptables(_))));
        world.memory().bad = None;
        world.set_faults(&[Fault { only_writes: true, ..Fault::always(Way::Interrupt) }]);
        let before = world.memory().writes();
        let again = parse("+ /drop/input/any/2.2.2.2, ".repeat(8).trim_end_matches(", ")).remove(0);
        let results = world.commit(&again);
        assert!(results.iter().all(|r| matches!(r, Err(ApiError::Busy(_)))));
        // The batch, its repairs and those without it.
        assert!(world.memory().writes() <= before + 1 + 2 * MAX_REPAIRS);
        world.set_faults(&[]);
        world.settle();
    }
}

/// A change of sets that fails permanently after any of its edits changes nothing.
#[test]
fn half_applied_set_changes() {
    let before = "+ /drop/input/any/1.1.1.1; + /accept/input/any/2.2.2.2";
    let changes = [
        "+ /accept/input/any/1.1.1.1",
        "+60 /reject/input/any/1.1.1.1",
        "+ /accept/input/any: 1.1.1.1 1.1.1.2 2001:db8::1",
        "- /drop/input/any: 1.1.1.1 1.1.1.2",
    ];
    for (change, has_file) in changes.iter().flat_map(|c| [(c, false), (c, true)]) {
        for count in 0..7 {
            for way in [Way::PartAndReject(count), Way::PartAndInterrupt(count)] {
                let mut world = World::new(true, has_file);
                world.put(before);
                let fault = Fault { only_writes: true, ..Fault::always(way) };
                world.set_faults(&[fault]);
                let is_made = world.commit(&parse(change)[0])[0].is_ok();
                if has_file {
                    // rfw is killed.
                    world.set_faults(&[]);
                    world.check_restart();
                }
                world.set_faults(&[]);
                world.settle();
                let kept = "/accept/input/any/2.2.2.2 0, /drop/input/any/1.1.1.1 0";
                assert_eq!(shown(&world.enforced()) == kept, !is_made, "{change} {way:?}");
            }
        }
    }
}

/// ipset was killed after its last line: the response was 503, and a restart brought back the
/// addresses that the list had deleted.
#[test]
fn a_list_applied_but_reported_failed() {
    let mut world = World::new(true, true);
    world.put("+ /drop/input/any: 1.1.1.1 1.1.1.2 1.1.1.3");
    world.set_faults(&[Fault::new(1, 1, Way::DoAndInterrupt)]);
    let results = world.commit(&parse("- /drop/input/any: 1.1.1.1 1.1.1.2")[0]);
    assert_eq!(verdict(&results[0]), Ok(Verdict::Deleted));
    world.check_restart();
    world.set_faults(&[Fault::always(Way::DoAndInterrupt)]);
    assert!(world.commit(&parse("- /drop/input/any: 1.1.1.3")[0])[0].is_err());
    world.set_faults(&[]);
    world.check_restart();
    assert_eq!(shown(&world.enforced()), "/drop/input/any/1.1.1.3 0");
}

/// Each listing is false once, with exit status 0: nothing is removed, repeated or "restored".
#[test]
fn a_false_listing_while_running() {
    let before = "+ /drop/input/any/1.1.1.1; + /accept/input/any/1.1.1.2; \
                  + /drop/input/any/2001:db8::1; + /drop/forward/any/1.1.1.1/any/2.2.2.2";
    for (sets, way) in [false, true].iter().flat_map(|sets| READ_WAYS.map(|way| (*sets, way))) {
        for first in 1..20 {
            let mut world = World::new(sets, false);
            world.put(before);
            world.settle();
            world.set_faults(&[Fault::new(first, 1, way)]);
            world.settle();
            assert_eq!(world.memory().writes(), 0, "{way:?} {first}");
            assert_eq!(world.metrics.restored.to_string(), "0", "{way:?} {first}");
        }
    }
}

/// A listing that lacked the leftovers of an error looked right, and the change counted as undone.
#[test]
fn a_false_listing_after_an_error() {
    for sets in [false, true] {
        for (first, lie) in (1..20).flat_map(|n| [(n, Lie::Empty), (n, Lie::FirstHalf)]) {
            let mut world = World::new(sets, false);
            world.put("+ /accept/output/any/2.2.2.2");
            let write = Fault::new(1, 3, Way::PartAndInterrupt(0));
            world.set_faults(&[Fault::new(first, 1, Way::Lie(lie)), write]);
            world.commit(&parse("- /accept/output/any/2.2.2.2")[0]);
            world.settle();
        }
    }
}

/// A list of as many addresses as are deleted only after a listing, if as many rules stay.
fn many(verb_and_path: &str, block: &str) -> String {
    let nets: Vec<String> = (0..150).map(|n| format!("{block}.{n}")).collect();
    format!("{verb_and_path}: {}", nets.join(" "))
}

/// A batch that reads the rules first deletes all of its own, though the listing lacks some.
#[test]
fn a_false_listing_while_many_rules_are_deleted() {
    let list = |verb, block| many(&format!("{verb} /drop/input/any"), block);
    for kind in [Lie::Empty, Lie::FirstHalf, Lie::WithoutSecond, Lie::Twice] {
        let mut world = World::new(false, false);
        world.put(&format!("{}; {}", list("+", "3.3.3"), list("+", "4.4.4")));
        world.put("+ /drop/input/any/2.2.2.2");
        world.settle();
        world.set_faults(&[Fault::new(1, 1, Way::Lie(kind))]);
        world.put(&list("-", "3.3.3"));
        world.set_faults(&[]);
        world.settle();
        assert_eq!(world.memory().writes(), 0, "{kind:?}");
    }
    // The listing lacks exactly the rules that are to be deleted.
    let mut world = World::new(false, false);
    world.engine().settings.guards.clear();
    world.put(&format!("{}; {}", list("+", "3.3.3"), list("+", "4.4.4")));
    world.settle();
    world.set_faults(&[Fault::new(1, 1, Way::Lie(Lie::FirstHalf))]);
    world.put(&list("-", "3.3.3"));
    world.settle();
}

/// If the disk was full when the clock was set, the file kept the old expiries, took changes, and was
/// rewritten by nothing but a change.
#[test]
fn the_clock_is_set_while_the_disk_is_full() {
    for by_a_change in [true, false] {
        let mut world = World::new(false, true);
        world.put("+600 /drop/input/any/1.1.1.1");
        let directory = world.directory.clone().unwrap();
        let obstacle = directory.join("state.new");
        fs::create_dir(&obstacle).unwrap();
        let engine = world.engine();
        engine.clock.follow(clock::wall() - Duration::from_secs(1_000));
        engine.tick();
        let change = &parse("+ /drop/input/any/2.2.2.2")[0];
        assert!(matches!(engine.commit(change)[0], Err(ApiError::State(_))));
        fs::remove_dir(&obstacle).unwrap();
        if by_a_change {
            assert!(engine.commit(change)[0].is_ok());
        } else {
            engine.tick();
            assert!(engine.state.as_ref().unwrap().is_outdated, "not before a minute has passed");
            engine.next_compaction = Instant::now();
            engine.tick();
        }
        let expires = engine.list.stored().next().unwrap().1.unwrap();
        let state = fs::read_to_string(directory.join("state")).unwrap();
        assert!(state.contains(&format!("+ {expires} ")), "{expires} {state}");
    }
}

/// `iptables -F; ipset destroy` left rfw stuck until a restart.
#[test]
fn two_sets_destroyed_at_once() {
    let changes = [
        "+ /drop/input/any/1.1.1.3",
        "- /drop/input/any/1.1.1.1",
        "+ /drop/forward/any/1.1.1.1/any/2.2.2.2",
        "",
    ];
    for change in changes {
        let mut world = World::new(true, false);
        world.put("+ /drop/input/any/1.1.1.1; + /accept/output/any/1.1.1.2");
        flush_and_destroy(&mut world);
        world.put(change);
        world.settle();
    }
}

/// An ACCEPT rule opened rfw's own port for its address.
#[test]
fn an_accept_rule_never_precedes_the_guards() {
    let damages: [(&str, Damage); 4] = [
        ("none", none),
        ("flush", flush),
        ("foreign rules", overtake),
        ("guards behind", |world| {
            world.memory().chain(Family::V4, Chain::Input).reverse();
        }),
    ];
    for (sets, (case, damage)) in [false, true].iter().flat_map(|s| damages.map(|d| (*s, d))) {
        for change in ["+ /accept/input/any/5.5.5.5", "+ /accept/input/any: 5.5.5.5 5.5.5.6"] {
            let mut world = World::new(sets, false);
            world.put("+ /drop/input/any/1.1.1.1");
            damage(&mut world);
            world.put(change);
            world.check_guards_first();
            let front = world.chain(Family::V4, Chain::Input);
            let is_guard = |row: &FakeRow| matches!(row, FakeRow::Own(t) if matches!(t.rule.kind, RuleKind::Guard(PORT)));
            // Two whitelisted ranges, one of them loopback, and the rest.
            assert!(front.iter().take(3).all(is_guard), "{case} {change}: {front:#?}");
            world.settle();
        }
    }
}

#[test]
fn overtaken_at_once_ten_times_then_once_a_minute() {
    let mut world = World::new(false, false);
    world.put("+ /drop/input/any/1.1.1.1");
    let is_first = |world: &mut World| {
        let engine = world.engine();
        engine.next_check = Instant::now();
        assert_eq!(engine.tick(), None);
        matches!(world.chain(Family::V4, Chain::Input)[0], FakeRow::Own(_))
    };
    for number in 1..=10 {
        world.insert_foreign(Family::V4, Chain::Input, 1, "-j DOCKER");
        assert!(is_first(&mut world), "{number}");
        assert_eq!(world.metrics.overtaken.to_string(), number.to_string());
    }
    world.insert_foreign(Family::V4, Chain::Input, 1, "-j DOCKER");
    assert!(!is_first(&mut world));
    // A missing rule is restored all the same, and a request restores the first position.
    world.memory().chain(Family::V6, Chain::Input).clear();
    assert!(!is_first(&mut world));
    assert!(!world.chain(Family::V6, Chain::Input).is_empty());
    world.put("+ /drop/input/any/1.1.1.1");
    assert!(is_first(&mut world));
    // A minute after the last time
    let earlier = |world: &mut World, seconds| {
        for at in world.engine().overtaken.values_mut().flatten() {
            *at = at.checked_sub(Duration::from_secs(seconds)).unwrap();
        }
    };
    world.insert_foreign(Family::V4, Chain::Input, 1, "-j DOCKER");
    earlier(&mut world, 59);
    assert!(!is_first(&mut world));
    earlier(&mut world, 1);
    assert!(is_first(&mut world));
    // Ten minutes after the first of the last ten times
    world.insert_foreign(Family::V4, Chain::Input, 1, "-j DOCKER");
    assert!(!is_first(&mut world));
    world.engine().overtaken.clear();
    assert!(is_first(&mut world));
}

/// A program that inserts into all chains at once was one of ten after four times.
#[test]
fn overtaken_in_all_chains_at_once() {
    let mut world = World::new(false, false);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/output/any/1.1.1.1; + /drop/forward/any/1.1.1.1");
    for number in 1..=10 {
        Chain::ALL.iter().for_each(|chain| world.insert_foreign(Family::V4, *chain, 1, "-j X"));
        world.tick();
        assert_eq!(world.metrics.overtaken.to_string(), number.to_string());
        for chain in Chain::ALL {
            let front = &world.chain(Family::V4, chain)[0];
            assert!(matches!(front, FakeRow::Own(_)), "{number} {chain:?}: {front:?}");
        }
    }
}

#[test]
fn one_family_failing_does_not_block_the_other() {
    let before = "+ /drop/input/any/1.1.1.1; + /drop/input/any/2001:db8::1; \
                  +60 /drop/input/any/1.1.1.2; +60 /drop/input/any/2001:db8::2";
    let addresses = [(Family::V4, "1.1.1"), (Family::V6, "2001:db8:")];
    for (sets, way) in [false, true].iter().flat_map(|sets| WRITE_WAYS.map(|way| (*sets, way))) {
        for (only_writes, index) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
            let (good, bad) = (addresses[index], addresses[1 - index]);
            let point = if good.0 == Family::V4 { "." } else { ":" };
            let mut world = World::new(sets, false);
            world.put(before);
            world.settle();
            let fault = Fault { family: Some(bad.0), only_writes, ..Fault::always(way) };
            let case = format!("{way:?} {} sets {sets}, only writes {only_writes}", bad.0);
            // Both need a repair, which always fails for the bad one.
            for family in Family::ALL {
                world.memory().chain(family, Chain::Input).clear();
            }
            world.is_damaged = true;
            world.pass(70);
            world.set_faults(&[fault]);
            for _ in 0..2 {
                world.tick();
            }
            let enforced = shown(&world.enforced());
            assert!(enforced.contains(&format!("{}{point}1", good.1)), "{case}: {enforced}");
            assert!(!enforced.contains(&format!("{}{point}2", good.1)), "{case}: {enforced}");
            let change = format!("+ /accept/output/any/{}{point}3", good.1);
            let results = world.commit(&parse(&change)[0]);
            assert!(results[0].is_ok(), "{case}: {results:?}");
            world.set_faults(&[]);
            world.settle();
        }
    }
}

/// The calls that a change needs in a healthy kernel. A wrong edit would be repaired, at a higher
/// cost.
#[test]
fn what_a_change_costs() {
    let list = |verb_and_path: &str, last: usize| {
        let nets: Vec<String> = (1..=last).map(|n| format!("3.3.3.{n}")).collect();
        format!("{verb_and_path}: {}", nets.join(" "))
    };
    let deleted = list("- /drop/input/any", MAX_DELETIONS + 1);
    let found_slowly = many("- /drop/output/any", "3.3.3");
    let put_twice =
        |n| format!("{}; {}", list("+ /drop/forward/any", n), list("+60 /drop/forward/any", n));
    let (few, many_refreshed) = (put_twice(MAX_DELETIONS), put_twice(MAX_DELETIONS + 1));
    let nets: Vec<String> =
        (0..=MAX_NUMBERED).map(|n| format!("4.4.{}.{}", n / 256, n % 256)).collect();
    let large = format!("+ /drop/input/any: {}", nets.join(" "));
    let before = format!(
        "{}; {}; {}; + /drop/input/any/1.1.1.1; + /drop/output/any/1.1.1.1; \
         + /drop/forward/any/1.1.1.1/any/2.2.2.2; + /accept/input/any/1.1.1.3",
        list("+ /drop/input/any", 70),
        many("+ /drop/output/any", "3.3.3"),
        many("+ /drop/output/any", "4.4.4")
    );
    let table = [
        (false, "+ /drop/input/any/5.5.5.5", "rw"),
        (false, "+ /drop/forward/any/5.5.5.5", "w"),
        (false, "+ /accept/input/any/5.5.5.5", "rw"),
        (false, "+60 /drop/input/any/1.1.1.1", "rw"),
        (false, "- /drop/input/any/1.1.1.1", "w"),
        (false, "- /accept/input/any/1.1.1.3", "w"),
        (false, "+ /drop/input/any/1.1.1.1", "r"),
        (false, "- /drop/input/any/5.5.5.5", ""),
        (false, "+60 /drop/input/any/1.1.1.1, + /drop/output/any/5.5.5.5", "rw"),
        (false, "+ /drop/input/any/1.1.1.1, + /drop/output/any/1.1.1.1", "r"),
        (false, "+ /drop/input/any/1.1.1.1, + /drop/output/any/5.5.5.5", "rw"),
        (false, "+ /drop/forward/any: 5.5.5.5 2001:db8::5", "w w"),
        (false, "+ /drop/input/any: 1.1.1.1 2001:db8::5", "r rw"),
        (false, &few, "ww"),
        (false, &many_refreshed, "rww"),
        (false, &deleted, "w"),
        (false, &found_slowly, "rw"),
        (false, "=60 /drop/input/any: 3.3.3.1 3.3.3.2", "rw"),
        (false, &large, "w"),
        (true, "+ /drop/output/any/5.5.5.5", "Wr"),
        (true, "+60 /drop/output/any/1.1.1.1", "Wr"),
        (true, "- /drop/output/any/1.1.1.1", "W"),
        (true, "+ /drop/input/any/1.1.1.3", "WWr"),
        (true, "+ /drop/output/any/1.1.1.1, + /drop/output/any/5.5.5.5", "Wr"),
        (true, "+ /reject/output/any/1.1.1.1", "WWrw"),
        (true, "+ /reject/output/any/5.5.5.5, - /reject/output/any/5.5.5.5", "WWrw"),
        (true, "+ /drop/forward/any/5.5.5.5/any/2.2.2.2", "w"),
        (true, "- /drop/forward/any/1.1.1.1/any/2.2.2.2", "w"),
    ];
    for (sets, changes, cost) in table {
        let mut world = World::new(sets, false);
        world.engine().list.sets = world.model.sets.then_some(400);
        world.put(&before);
        world.settle();
        world.set_faults(&[]);
        world.put(changes);
        assert_eq!(world.cost(), cost, "{changes}");
        world.settle();
    }
}

/// Each listing once; a distrusted family is read twice, with sets before and after these, and all
/// addresses in sets when that is due.
#[test]
fn what_a_check_costs() {
    let table = [
        // With sets, before the next check, distrusted, all addresses
        (false, true, false, false, ""),
        (false, false, false, false, "r r"),
        (false, false, true, false, "rr r"),
        (true, false, false, false, "Rr r"),
        (true, false, false, true, "RRRRr r"),
        (true, false, true, false, "RRRRRrrrr r"),
    ];
    for (sets, is_early, is_distrusted, is_due, cost) in table {
        let mut world = World::new(sets, false);
        world.put("+ /drop/input/any/1.1.1.1");
        world.settle();
        let now = Instant::now();
        let in_time = |is_now: bool| now + Duration::from_secs(if is_now { 0 } else { 60 });
        let engine = world.engine();
        engine.distrusted.extend(is_distrusted.then_some(Family::V4));
        (engine.next_check, engine.next_sets_check) = (in_time(!is_early), in_time(is_due));
        world.set_faults(&[]);
        let engine = world.engine();
        let before = engine.next_sets_check;
        assert_eq!(engine.tick(), None);
        assert_eq!(engine.next_sets_check > before, is_due, "{cost}");
        assert_eq!(world.cost(), cost);
    }
}

/// A check that fails fast keeps no request waiting, and the next one tries everything again.
#[test]
fn a_check_that_fails() {
    for (sets, part) in [(false, Part::Rules(Family::V6)), (true, Part::Sets)] {
        let mut world = World::new(sets, false);
        world.set_faults(&[Fault { part: Some(part), ..Fault::always(Way::Reject) }]);
        let engine = world.engine();
        let now = Instant::now();
        (engine.next_check, engine.next_sets_check) = (now, now);
        assert_eq!(engine.tick(), None);
        assert!(engine.outage.is_some() && engine.next_sets_check == now);
    }
}

/// IPv4 rules expired up to 19 s late while ip6tables hung.
#[test]
fn a_failure_of_one_family_does_not_delay_the_expiry_of_the_other() {
    for (distrusted, writes) in [(Family::V6, 1), (Family::V4, 0)] {
        let mut world = World::new(false, false);
        world.put("+60 /drop/input/any/1.1.1.1");
        world.pass(70);
        world.set_faults(&[]);
        let engine = world.engine();
        engine.distrusted.insert(distrusted);
        assert_eq!(engine.expire(), Ok(()));
        assert_eq!(world.memory().writes(), writes, "{distrusted}");
        world.settle();
    }
}

/// ip6tables-nft does not compare the lengths of prefixes: DELETE of a block deleted a newer one with the
/// same first address, and each repair did the same.
#[test]
fn ipv6_blocks_with_the_same_first_address() {
    const NETS: [&str; 4] = ["2001:db8::/32", "2001:db8::/48", "2001:db8::/64", "2001:db8::"];
    for rule in ["/drop/input/any/NET", "/drop/forward/any/NET/any/2001:db8::9"] {
        let mut world = World::new(false, false);
        let rules: Vec<String> = NETS.iter().map(|net| rule.replace("NET", net)).collect();
        rules.iter().for_each(|rule| world.put(&format!("+ {rule}")));
        for step in [format!("- {}", rules[1]), format!("+60 {}", rules[0])] {
            world.put(&step);
            let held = world.enforced();
            world.settle();
            assert_eq!(shown(&world.enforced()), shown(&held), "{step}");
        }
        assert_eq!(world.enforced().len(), 3);
    }
}

/// Rules that could not be deleted waited for the next check, but only if it had failed, too: a
/// program that hung was started again every second.
#[test]
fn rules_that_cannot_be_deleted_wait_for_a_check() {
    let mut world = World::new(false, false);
    world.put("+60 /drop/input/any/2001:db8::1");
    world.pass(70);
    let hangs = Fault { family: Some(Family::V6), ..Fault::always(Way::Interrupt) };
    world.set_faults(&[hangs]);
    let engine = world.engine();
    engine.deadline = Instant::now() + BATCH_LIMIT - TOOL_LIMIT;
    assert!(engine.expire().is_err(), "a request that waits for it must not wait twice");
    assert_eq!(world.cost(), " w");
    let engine = world.engine();
    engine.begin();
    assert_eq!(engine.expire(), Ok(()));
    assert_eq!(world.cost(), " w");
    world.set_faults(&[]);
    world.settle();
    assert!(world.enforced().is_empty());
}

/// The sets of one family cannot be written: those of the other are repaired in the same check.
#[test]
fn one_family_of_sets_does_not_block_the_other() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any: 1.1.1.1 2001:db8::1");
    world.settle();
    empty_sets(&mut world);
    let fault = Fault { family: Some(Family::V4), only_writes: true, ..Fault::always(Way::Reject) };
    world.set_faults(&[fault]);
    let engine = world.engine();
    engine.begin();
    assert!(engine.check().is_err());
    assert_eq!(shown(&world.enforced()), "/drop/input/any/2001:db8::1 0");
    world.set_faults(&[]);
    world.settle();
}

/// The rule of a set stands for its addresses, unless only a few are asked for.
#[test]
fn what_a_listing_shows() {
    assert_eq!(MAX_FEW, 8);
    let mut world = World::new(true, false);
    world.engine().list.sets = world.model.sets.then_some(9);
    let nets: Vec<_> = (0..9).map(|n| format!("1.1.1.{n}")).collect();
    world.put(&format!("+ /drop/input/any: {} 2001:db8::1", nets.join(" ")));
    world.put("+ /drop/forward/any/1.1.1.1/any/2.2.2.2");
    world.settle();
    let few: Vec<_> = (0..8).map(|n| format!("4 /drop/input/any/1.1.1.{n}")).collect();
    let few = format!("{}, 1 /drop/forward/any/1.1.1.1/any/2.2.2.2", few.join(", "));
    let table = [
        (
            "",
            "4 rfw4:drop:in:any, 1 /drop/forward/any/1.1.1.1/any/2.2.2.2, 4 rfw6:drop:in:any",
            "r r",
        ),
        ("1.1.1.8", "4 /drop/input/any/1.1.1.8", "r"),
        ("1.1.1.0/29", &few, "r"),
        ("1.1.1.0/28", "4 rfw4:drop:in:any, 1 /drop/forward/any/1.1.1.1/any/2.2.2.2", "r"),
        ("2.2.2.2", "1 /drop/forward/any/1.1.1.1/any/2.2.2.2", "r"),
        ("2001:db8::1", "4 /drop/input/any/2001:db8::1", " r"),
        ("2001:db8::2", "", " r"),
    ];
    for (text, expected, cost) in table {
        let (addr, mask) = text.split_once('/').unwrap_or((text, ""));
        let host = addr.parse().ok().map(Net::host);
        let filter = Filter {
            net: host
                .map(|net| mask.parse().ok().and_then(|m| Net::new(net.addr(), m)).unwrap_or(net)),
            ..Filter::default()
        };
        for lies in [false, true] {
            let lie = Fault::new(1, usize::from(lies), Way::Lie(Lie::FirstHalf));
            world.set_faults(&[lie]);
            let rules = world.engine().listing(&filter).unwrap();
            let rules: Vec<_> =
                rules.iter().map(|(number, tagged)| format!("{number} {}", tagged.rule)).collect();
            assert_eq!(rules.join(", "), expected, "{text}");
            assert!(lies || world.cost() == cost, "{text} {}", world.cost());
        }
    }
}

/// The part that hung must not keep the others from being checked.
#[test]
fn after_a_hang_the_next_check_begins_with_another_part() {
    let mut world = World::new(true, false);
    let parts = [Part::Sets, Part::Rules(Family::V4), Part::Rules(Family::V6), Part::Sets];
    for part in parts {
        for _ in 0..2 {
            world.set_faults(&[]);
            let engine = world.engine();
            engine.begin();
            assert_eq!(engine.check(), Ok(()));
            assert_eq!(world.memory().calls[0].0, part);
        }
        world.set_faults(&[]);
        let engine = world.engine();
        engine.deadline = Instant::now() + BATCH_LIMIT - TOOL_LIMIT;
        assert_eq!(engine.check(), Ok(()));
        assert_eq!(world.memory().calls.len(), 1, "expiry may take the time of every tick");
    }
}

/// A program that hung is not started again in the same batch, and no batch exceeds its limit.
#[test]
fn time_limit() {
    let changes = parse("+ /drop/input/any/1.1.1.2");
    let changes: Vec<&Change> = changes[0].iter().collect();
    // The time left for the batch; its calls: one, and two times five repairs. A limit is extended
    // for each of two rules and an edit.
    let table = [(30, 11), (21, 11), (20, 1), (1, 1), (0, 1)];
    for (left, calls) in table {
        let mut world = World::new(false, true);
        world.put("+ /drop/input/any/1.1.1.1");
        world.set_faults(&[Fault::always(Way::Interrupt)]);
        world.memory().limit = Duration::ZERO;
        let left = Duration::from_secs(left);
        let engine = world.engine();
        engine.deadline = Instant::now() + left;
        assert!(engine.attempt(&changes).is_err());
        assert_eq!(world.memory().calls.len(), calls, "{left:?}");
        assert!(world.memory().limit <= left.min(TOOL_LIMIT + 30 * EDIT_LIMIT), "{left:?}");
        world.set_faults(&[]);
        world.settle();
    }
    // The time left; its calls, if the family is distrusted
    for (left, calls) in [(30, MAX_REPAIRS), (20, 1)] {
        let mut world = World::new(false, false);
        world.set_faults(&[Fault::always(Way::Interrupt)]);
        let engine = world.engine();
        engine.distrusted.insert(Family::V4);
        engine.deadline = Instant::now() + Duration::from_secs(left);
        assert!(engine.attempt(&changes).is_err());
        assert_eq!(world.memory().calls.len(), calls, "{left}");
    }
    let mut world = World::new(false, false);
    let engine = world.engine();
    engine.begin();
    assert_eq!(engine.limit(0), TOOL_LIMIT);
    assert_eq!(engine.limit(100_000), TOOL_LIMIT + Duration::from_secs(2));
    assert!(engine.limit(2_000_000) <= BATCH_LIMIT);
    // On a slow processor, iptables-nft was killed each time it moved 20,000 rules to the front.
    assert!(engine.rules_limit(Family::V4, 40_000) > Duration::from_secs(5 * 5));
    // The same at a start, each time it moved 100,000.
    (engine.is_starting, engine.deadline) = (true, clock::after(START_LIMIT));
    assert!(engine.rules_limit(Family::V4, 100_000) > Duration::from_secs(180));
}

/// Deletions are divided unless an insertion follows them; in one transaction, the kernel takes time that
/// grows with their square. If only rules are deleted, an ACCEPT rule does not outlast newer ones: an
/// address that was blocked, and is blocked afterwards by another tag, was accepted for a moment.
#[test]
fn deletions_in_parts() {
    // The maximum, the edits, and how many transactions they take
    let table = [
        (3, "DDD", 1),
        (3, "DDDD", 2),
        (3, "DDDDDDD", 3),
        (3, "DDDDDDI", 1),
        (3, "DIDDDDD", 3),
        (3, "DDDADDD", 2),
        (3, "DDDDDDA", 1),
        (3, "DIDADDA", 3),
        (usize::MAX, "DDDDDDD", 1),
    ];
    for (max, edits, transactions) in table {
        let mut world = World::new(false, false);
        let path = |(number, kind): (usize, char)| {
            let target = if kind == 'A' { "accept" } else { "drop" };
            format!("/{target}/input/any/1.1.1.{number}")
        };
        let deleted = (1..).zip(edits.chars()).filter(|(_, kind)| *kind != 'I');
        let put: Vec<String> = deleted.map(|edit| format!("+ {}", path(edit))).collect();
        world.put(&put.join("; "));
        let writes = world.memory().writes();
        let edit = |(number, kind): (usize, char)| {
            let rule = path((number, kind)).parse().unwrap();
            let tagged = TaggedRule::new(KernelRule::plain(rule), None);
            if kind == 'I' { RuleEdit::Insert(1, tagged) } else { RuleEdit::Delete(tagged) }
        };
        let edits: Vec<RuleEdit> = (1..).zip(edits.chars()).map(edit).collect();
        let engine = world.engine();
        engine.settings.max_deletions = max;
        engine.begin();
        engine.write_rules(Family::V4, &edits).unwrap();
        assert_eq!(world.memory().writes() - writes, transactions, "{max} {edits:?}");
    }
}

/// A large list moves the guards out of its way and back, in one transaction.
#[test]
fn only_a_large_list_moves_the_guards() {
    for (count, is_moved) in [(MAX_NUMBERED, false), (MAX_NUMBERED + 1, true)] {
        let mut world = World::new(false, false);
        let nets: Vec<String> =
            (0..count).map(|n| format!("4.4.{}.{}", n / 256, n % 256)).collect();
        let change = parse_change(&format!("+ /drop/input/any: {}", nets.join(" ")));
        let engine = world.engine();
        let batch = engine.list.apply(&[&change], engine.now()).unwrap();
        let edits = engine.rule_edits(&batch, Family::V4).unwrap();
        assert_eq!(matches!(edits[0], RuleEdit::Delete(_)), is_moved, "{count}");
        world.set_faults(&[]);
        assert_eq!(world.kernel.write_rules(Family::V4, &edits, TOOL_LIMIT), Ok(()));
        world.check_guards_first();
    }
}

/// An address that moves to another set is for a moment in both rather than in neither.
#[test]
fn an_address_joins_a_set_before_it_leaves_another() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.1; + /accept/input/any/2.2.2.2");
    // The first edit is made, then nothing.
    let way = |first, count, way| Fault { only_writes: true, ..Fault::new(first, count, way) };
    let stop = way(2, usize::MAX, Way::Interrupt);
    world.set_faults(&[way(1, 1, Way::PartAndInterrupt(1)), stop]);
    assert!(world.commit(&parse("+ /accept/input/any/1.1.1.1")[0])[0].is_err());
    let enforced = shown(&world.enforced());
    assert!(enforced.contains("/accept/input/any/1.1.1.1"), "{enforced}");
    assert!(enforced.contains("/drop/input/any/1.1.1.1"), "{enforced}");
    world.set_faults(&[]);
    world.settle();
}

#[test]
fn a_repair_is_checked_again_soon() {
    let table: [(bool, Damage, bool); 4] =
        [(false, none, false), (false, flush, true), (true, none, false), (true, empty_sets, true)];
    for (sets, damage, has_repaired) in table {
        let mut world = World::new(sets, false);
        world.put("+ /drop/input/any/1.1.1.1");
        world.settle();
        damage(&mut world);
        let engine = world.engine();
        engine.begin();
        engine.next_sets_check = Instant::now();
        assert_eq!(engine.check(), Ok(()));
        assert_eq!(engine.has_repaired, has_repaired, "sets {sets}");
    }
}

#[test]
fn a_start_destroys_unused_sets() {
    for sets in [false, true] {
        let mut world = World::new(sets, false);
        world.put("+ /drop/input/any/1.1.1.1");
        for name in ["rfw4:drop:in:eth0", "rfw4:drop:in:eth1"] {
            let set = FakeSet { maxelem: MAXELEM, entries: BTreeMap::new() };
            world.memory().sets.insert(name.into(), set);
        }
        world.insert_foreign(Family::V4, Chain::Forward, 1, "-m set rfw4:drop:in:eth1 src");
        world.restart();
        let names: Vec<String> = world.memory().sets.keys().cloned().collect();
        let own = ["rfw4:drop:in:any", "rfw4:drop:in:eth1"];
        assert_eq!(names, if sets { &own[..] } else { &own[1..] });
    }
}

/// What a request repairs along with its own rule is restored; its own rule is not.
#[test]
fn what_is_counted() {
    // With sets, the damage, a change, the rules restored
    let table: [(bool, Damage, &str, usize); 6] = [
        (false, none, "", 0),
        (false, flush, "", 2),
        (false, flush, "+ /drop/input/any/1.1.1.1", 1),
        (true, empty_sets, "", 2),
        (true, empty_sets, "+ /drop/input/any/1.1.1.1", 1),
        (true, flush, "", 1),
    ];
    for (sets, damage, change, restored) in table {
        let mut world = World::new(sets, false);
        world.engine().settings.guards.clear();
        world.put("+ /drop/input/any/1.1.1.1; + /drop/input/any/1.1.1.2");
        world.settle();
        damage(&mut world);
        world.is_damaged = true;
        world.put(change);
        world.settle();
        assert_eq!(world.metrics.restored.to_string(), restored.to_string(), "{sets} {change}");
    }
}

/// The whitelist has grown since the rules were stored.
#[test]
fn a_start_drops_whitelisted_rules_from_list_and_file() {
    let mut world = World::new(false, true);
    world.put("+ /drop/input/any/1.1.1.1");
    world.engine = None;
    let path = world.directory.as_ref().unwrap().join("state");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}+ 0 /drop/input/any/192.0.2.0/24\n")).unwrap();
    world.start().unwrap();
    world.tick();
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    world.settle();
}

/// The state file recorded that a drop replaced an accept, which came back when the drop expired.
#[test]
fn an_expired_target_does_not_take_another_one_with_it() {
    let mut world = World::new(false, true);
    world.put("+ /accept/input/any/1.1.1.1; +60 /drop/input/any/1.1.1.1");
    world.pass(70);
    world.restart_with(true);
    world.settle();
    assert_eq!(shown(&world.enforced()), "/accept/input/any/1.1.1.1 0");
    world.check_restart();
}

/// An address keeps its newest target, also after the next start.
#[test]
fn rules_with_two_targets_become_sets() {
    let mut world = World::new(false, true);
    world.put("+ /accept/input/any/1.1.1.1; + /drop/input/any/1.1.1.1");
    world.restart_with(true);
    world.put("- /drop/input/any/1.1.1.1");
    world.check_restart();
    assert_eq!(shown(&world.enforced()), "");
}

/// At a start from rules to sets, the disk is full: the file keeps a target that was displaced,
/// which must not come back when the newer one is deleted.
#[test]
fn a_displaced_target_stays_out_of_a_file_that_could_not_be_compacted() {
    let mut world = World::new(false, true);
    world.put("+ /accept/input/any/1.1.1.1; + /drop/input/any/1.1.1.1");
    let blocker = world.directory.clone().unwrap().join("state.new");
    fs::create_dir(&blocker).unwrap();
    world.restart_with(true);
    let changes = parse("- /drop/input/any/1.1.1.1");
    let results = world.commit(&changes[0]);
    assert!(matches!(results[0], Err(ApiError::State(_))), "{results:?}");
    fs::remove_dir(&blocker).unwrap();
    world.put("- /drop/input/any/1.1.1.1");
    world.check_restart();
    assert_eq!(shown(&world.enforced()), "");
}

/// Sets accept before they drop, so their addresses must become rules in that order.
#[test]
fn sets_become_rules_in_their_order() {
    let mut world = World::new(true, false);
    world.put(
        "+ /accept/input/any/1.1.1.1; + /reject/input/any/1.1.1.2; \
               + /drop/input/any/1.1.1.0/24; + /accept/forward/any/1.1.1.1; \
               + /drop/forward/any/1.1.1.1/any/2.2.2.2",
    );
    let before = shown(&world.enforced());
    world.restart_with(false);
    assert_eq!(shown(&world.enforced()), before);
}

/// A list of rules may exceed the limit of sets, and an old set of that name may exist.
#[test]
fn a_set_that_is_too_small_is_replaced() {
    let mut world = World::new(false, true);
    world.put("+ /drop/input/any: 1.1.1.1 1.1.1.2 1.1.1.3 1.1.1.4 1.1.1.5 1.1.1.6 1.1.1.7");
    for name in ["rfw4:drop:in:any", "rfw4?drop:in:any"] {
        let set = FakeSet { maxelem: MAXELEM, entries: BTreeMap::new() };
        world.memory().sets.insert(name.into(), set);
    }
    world.restart_with(true);
    world.settle();
}

/// A set with another limit is replaced, if its addresses fit into the new one.
#[test]
fn the_limit_of_a_set_follows_rfw_conf() {
    for (maxelem, expected) in [(MAXELEM, MAXELEM), (2 * MAXELEM, MAXELEM)] {
        let mut world = World::new(true, false);
        world.put("+ /drop/input/any: 1.1.1.1 1.1.1.2 1.1.1.3 1.1.1.4 1.1.1.5 1.1.1.6");
        let name = "rfw4:drop:in:any";
        world.memory().sets.get_mut(name).unwrap().maxelem = maxelem;
        world.restart();
        assert_eq!(world.memory().sets[name].maxelem, expected);
        world.settle();
    }
}

/// A set outlived its rule because a foreign rule used it, and still had its old entries when rfw
/// needed it again.
#[test]
fn a_new_set_is_empty() {
    let mut world = World::new(true, true);
    world.put("+ /drop/input/any/1.1.1.1; + /accept/output/any/1.1.1.1");
    let line = "-m set --match-set rfw4:drop:in:any src -j LOG";
    world.insert_foreign(Family::V4, Chain::Forward, 1, line);
    world.put("- /drop/input/any/1.1.1.1");
    world.settle();
    let seven = Net::parse("7.7.7.7").unwrap();
    world.restart();
    world.memory().sets.get_mut("rfw4:drop:in:any").unwrap().entries.insert(seven, None);
    world.put("+ /drop/input/any/1.1.1.2");
    world.check();
}

#[test]
fn a_state_file_that_cannot_be_written() {
    for sets in [false, true] {
        let mut world = World::new(sets, true);
        world.put("+ /drop/input/any/1.1.1.1");
        let path = world.directory.as_ref().unwrap().join("state");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}x")).unwrap();
        world.set_faults(&[]);
        let results =
            world.commit(&parse("+ /drop/input/any/1.1.1.2, - /drop/input/any/1.1.1.1")[0]);
        let is_refused = |result: &Result<_, _>| matches!(result, Err(ApiError::State(_)));
        assert!(results.iter().all(is_refused), "{results:?}");
        assert_eq!(world.memory().writes(), 0);
        fs::write(&path, text).unwrap();
        world.put("+ /drop/input/any/1.1.1.2");
        world.settle();
    }
}

/// When all rules were in the kernel, a start still failed if rfw could not look for sets that
/// nothing uses.
#[test]
fn a_start_does_not_depend_on_leftovers() {
    for way in READ_WAYS {
        let mut world = World::new(true, true);
        world.put("+ /drop/input/any: 1.1.1.1 2001:db8::1");
        // The headers and the set of each family, and the headers again
        world.set_faults(&[Fault { part: Some(Part::Sets), ..Fault::new(5, 1, way) }]);
        assert_eq!(world.start(), Ok(()), "{way:?}");
        assert_eq!(world.cost().matches('R').count(), 5, "{}", world.cost());
        world.settle();
    }
}

/// A batch that the disk refused was attempted in halves: with a large list and a state file to be
/// rewritten, 100 changes kept all requests waiting for 19 s.
#[test]
fn a_batch_that_the_disk_refuses_is_attempted_once() {
    let mut world = World::new(false, true);
    let path = world.directory.as_ref().unwrap().join("state");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}x")).unwrap();
    let changes = (1..9).map(|number| format!("+ /drop/input/any/1.1.1.{number}"));
    let results = world.commit(&parse(&changes.collect::<Vec<_>>().join(", "))[0]);
    assert!(results.iter().all(|result| matches!(result, Err(ApiError::State(_)))), "{results:?}");
    fs::write(&path, text).unwrap();
    world.put("+ /drop/input/any/2.2.2.2");
    let template = RuleTemplate::parse(&["drop", "input", "any"]).unwrap();
    let net = Net::parse("2.2.2.2").unwrap();
    let (_, entry) = world.engine().list.overlapping(template, net).next().unwrap();
    assert_eq!(entry.serial.get(), 9, "each attempt takes new serial numbers");
}

/// While many rules expired or were deleted each second, rfw read all rules each second, too,
/// whatever that cost.
#[test]
fn a_batch_that_reads_the_rules_first_is_not_a_repair() {
    let mut world = World::new(false, false);
    let [input, output] = ["/drop/input/any", "/drop/output/any"];
    world.put(&many(&format!("+60 {input}"), "3.3.3"));
    world.put(&many(&format!("+ {input}"), "4.4.4"));
    world.put(&many(&format!("+ {output}"), "3.3.3"));
    world.put(&many(&format!("+ {output}"), "4.4.4"));
    world.settle();
    world.set_faults(&[]);
    world.put(&many(&format!("- {output}"), "3.3.3"));
    assert_eq!(world.cost(), "rw");
    assert!(!world.engine().has_repaired);
    world.pass(70);
    assert_eq!(world.engine().expire(), Ok(()));
    assert!(!world.engine().has_repaired);
}

// ---------------------------------------------------------------------------------------------
// Random sequences

/// Xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn change(&mut self) -> Change {
        let verb = self.pick(&["+", "+", "+", "+60", "+600", "-", "-", "!"]);
        if self.one_in(20) {
            return parse_change(self.pick(&["- @a", "- @b"]));
        }
        let tag = self.pick(&["", "", "@a", "@b"]);
        if !self.one_in(5) {
            return parse_change(&format!("{verb} {}{tag}", self.pick(&RULES)));
        }
        let template = self.pick(&["/drop/input/any", "/accept/input/any", "/drop/forward/eth0"]);
        let verb = if tag.is_empty() { verb } else { self.pick(&[verb, "=", "=60"]) };
        let nets: Vec<&str> = NETS.iter().copied().filter(|_| self.one_in(3)).collect();
        if nets.is_empty() {
            return self.change();
        }
        parse_change(&format!("{verb} {template}{tag}: {}", nets.join(" ")))
    }

    /// Faults of some future calls; at most one lie, because two in a row may agree.
    fn faults(&mut self) -> Vec<Fault> {
        let (first, count) = (1 + self.below(10), 1 + self.below(7));
        let mut fault = Fault::new(first, count, self.pick(&WRITE_WAYS));
        fault.only_writes = self.one_in(3);
        fault.family = self.pick(&[None, None, Some(Family::V4), Some(Family::V6)]);
        let part = self.pick(&[Part::Sets, Part::Rules(Family::V4), Part::Rules(Family::V6)]);
        let mut lie = Fault::new(1 + self.below(6), 1, self.pick(&READ_WAYS));
        lie.part = Some(part);
        match self.below(6) {
            0 | 1 => vec![],
            2 => vec![lie],
            3 => vec![lie, fault],
            _ => vec![fault],
        }
    }
}

const RULES: [&str; 20] = [
    "/drop/input/any/1.1.1.1",
    "/accept/input/any/1.1.1.1",
    "/reject/input/any/1.1.1.1",
    "/drop/input/any/1.1.1.0/24",
    "/accept/input/any/1.1.1.2",
    "/drop/input/eth0/1.1.1.1",
    "/drop/output/any/1.1.1.1",
    "/accept/output/any/2.2.2.2",
    "/drop/input/any/2001:db8::1",
    "/accept/input/any/2001:db8::1",
    "/drop/input/any/2001:db8::/64",
    "/drop/input/any/2001:db8::/48",
    "/drop/forward/any/2001:db8::/64/any/2001:db8::2",
    "/drop/forward/any/1.1.1.1",
    "/accept/forward/any/1.1.1.1/any/2.2.2.2",
    "/drop/forward/any/1.1.1.1/any/2.2.2.2",
    "/drop/forward/any/0.0.0.0/any/2.2.2.2",
    "/accept/forward/eth0/0.0.0.0",
    "/drop/forward/any/2001:db8::/48/any/2001:db8::2",
    "/reject/forward/eth0/2001:db8::1",
];

const NETS: [&str; 9] = [
    "1.1.1.1",
    "1.1.1.2",
    "1.1.1.3",
    "1.1.1.4",
    "1.1.1.5",
    "1.1.1.6",
    "1.1.1.7",
    "2001:db8::1",
    "2001:db8::2",
];

impl World {
    /// Changes of the kernel by other programs and people.
    fn damage(&mut self, random: &mut Random) -> usize {
        let (family, chain) = (random.pick(&Family::ALL), random.pick(&Chain::ALL));
        let mut memory = self.kernel.lock();
        let set = match memory.sets.len() {
            0 => None,
            count => memory.sets.keys().nth(random.below(count)).cloned(),
        };
        let rows = memory.chain(family, chain);
        let at = random.below(rows.len() + 1);
        let own = |line: &str| {
            let rule: Rule = line.parse().unwrap();
            let is_here = rule.family() == family && rule.chain() == chain;
            is_here.then(|| FakeRow::Own(TaggedRule::new(KernelRule::plain(rule), None)))
        };
        let kind = random.below(13);
        match (kind, set) {
            (0, _) => memory.chains.retain(|(known, _), _| *known != family),
            (1, _) => {
                memory.chains.clear();
                memory.sets.clear();
            }
            (2, Some(name)) => memory.sets.get_mut(&name).unwrap().entries.clear(),
            (3, _) if at < rows.len() => drop(rows.remove(at)),
            (4, _) if at < rows.len() => rows.insert(random.below(at + 1), rows[at].clone()),
            (5 | 6, _) => rows.insert(at, FakeRow::Foreign("-j ACCEPT".into())),
            (7, _) => rows.insert(0, FakeRow::Foreign("-j DOCKER".into())),
            (8, Some(name)) => {
                let net = Net::parse(random.pick(&["9.9.9.9", "1.1.1.1"])).unwrap();
                memory.sets.get_mut(&name).unwrap().entries.insert(net, None);
            }
            (9, _) => rows.extend(own(random.pick(&RULES))),
            (10, _) if rows.len() > 1 => rows.reverse(),
            // No other program knows the name of a set that only replaces another one.
            (11, Some(name)) if !name.contains('?') => {
                rows.insert(at, FakeRow::Foreign(format!("--match-set {name} src")))
            }
            (12, _) => {
                let names = ["rfw4:drop:in:any", "rfw4?drop:in:any", "rfw6:accept:in:any"];
                let maxelem = random.pick(&[MAXELEM, MAXELEM + 1]);
                let entries = [(Net::parse("7.7.7.7").unwrap(), None)].into();
                let name = random.pick(&names).to_string();
                memory.sets.entry(name).or_insert(FakeSet { maxelem, entries });
            }
            _ => {}
        }
        drop(memory);
        self.foreign = self.foreign_rows();
        self.is_damaged = true;
        kind
    }

    fn step(&mut self, random: &mut Random) {
        let faults = random.faults();
        match random.below(12) {
            0 => {
                self.trace("settle", &[]);
                self.settle();
            }
            1 => {
                let damage = self.damage(random);
                self.trace(&format!("damage {damage}"), &[]);
            }
            2 => {
                self.trace("time passes", &[]);
                self.pass(random.pick(&[70, 700]));
            }
            3 => {
                let sets = self.model.sets != random.one_in(4);
                self.trace(&format!("restart, sets {sets}"), &faults);
                self.restart_with(sets);
            }
            4 => {
                self.trace("tick", &faults);
                self.tick();
            }
            _ => {
                let changes: Vec<Change> = (0..=random.below(4)).map(|_| random.change()).collect();
                let shown = |change: &Change| {
                    let rules = change.rules.iter().map(|rule| rule.to_string());
                    format!("{:?} {}", change.action, rules.collect::<Vec<_>>().join(" "))
                };
                self.trace(&changes.iter().map(shown).collect::<Vec<_>>().join(", "), &faults);
                let results = self.commit(&changes);
                let shown = |result: &Result<Outcome, ApiError>| match result {
                    Ok(outcome) => outcome.tally.single().map_or("nothing", Verdict::name).into(),
                    Err(error) => format!("{error:?}"),
                };
                let results: Vec<String> = results.iter().map(shown).collect();
                self.trace.push(format!("    {}", results.join(", ")));
                // Without a fault, only a full set is a reason to refuse, whatever happened before.
                let is_fine = |result: &String| {
                    !faults.is_empty()
                        || !["Iptables", "Busy"].iter().any(|e| result.starts_with(e))
                };
                assert!(results.iter().all(is_fine), "{results:?}");
            }
        }
    }

    /// Installs the faults of a step and records it.
    fn trace(&mut self, step: &str, faults: &[Fault]) {
        self.set_faults(faults);
        let shown = |fault: &Fault| {
            let Fault { part, first, count, way, family, only_writes } = fault;
            format!(" [{part:?} {way:?} {first}+{count} {family:?} {only_writes}]")
        };
        self.trace.push(format!("{step}{}", faults.iter().map(shown).collect::<String>()));
    }
}

/// After any sequence of changes, faults, damage and restarts, the kernel matches the responses.
fn check_random(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut world = World::new(random.one_in(2), random.one_in(2));
        let run = panic::catch_unwind(panic::AssertUnwindSafe(|| {
            (0..100).for_each(|_| world.step(&mut random));
            world.trace("the end", &[]);
            world.settle();
            world.check_restart();
        }));
        let steps = &world.trace[world.trace.len().saturating_sub(40)..];
        assert!(run.is_ok(), "seed {seed}, file {:?}:\n{}", world.directory, steps.join("\n"));
    }
}

#[test]
fn random_sequences() {
    check_random(0..40);
}

/// A batch of single changes is in the file without `* COUNT`. A move between sets is two records:
/// if rfw is killed, or the power cut, between the two writes, the address is in neither set.
#[test]
fn a_move_between_sets_that_reaches_the_file_by_half() {
    let mut world = World::new(true, true);
    world.put("+ /accept/input/any/1.1.1.1");
    let path = world.directory.clone().unwrap().join("state");
    let before = fs::read_to_string(&path).unwrap();
    world.put("+ /drop/input/any/1.1.1.1");
    let after = fs::read_to_string(&path).unwrap();
    let appended: Vec<&str> = after.strip_prefix(&before).unwrap().lines().collect();
    world.engine = None;
    // What a kill between two writes, or a power cut, leaves: complete lines.
    fs::write(&path, format!("{before}{}\n", appended[0])).unwrap();
    world.start().unwrap();
    assert_eq!(shown(&world.enforced()), "/accept/input/any/1.1.1.1 0", "{appended:?}");
}

/// An expiry that took effect but failed: rfw inserts the expired rules again, and says that
/// someone else had removed them.
#[test]
fn an_expired_rule_is_inserted_again() {
    let mut world = World::new(false, false);
    world.put("+60 /drop/input/any/1.1.1.1");
    world.settle();
    world.pass(70);
    world.set_faults(&[Fault::new(1, 1, Way::DoAndInterrupt)]);
    let engine = world.engine();
    // iptables was killed after its time limit.
    engine.deadline = Instant::now() + BATCH_LIMIT - TOOL_LIMIT;
    assert!(engine.expire().is_err());
    assert!(world.enforced().is_empty(), "the kernel does not hold it any more");
    world.set_faults(&[]);
    let engine = world.engine();
    engine.next_check = Instant::now();
    assert_eq!(engine.tick(), None);
    assert!(world.enforced().is_empty(), "inserted again: {}", shown(&world.enforced()));
    assert_eq!(world.metrics.restored.to_string(), "0");
}

/// One failed expiry (the xtables lock was held, say), and all due rules stay until the next check:
/// with many rules or addresses, that is minutes later.
#[test]
fn an_expiry_that_failed_once_waits_for_a_late_check() {
    let mut world = World::new(false, false);
    world.put("+60 /drop/input/any/1.1.1.1; +60 /drop/input/any/1.1.1.2");
    world.settle();
    world.pass(70);
    // As after a check that took 5 s of processor time
    world.engine().next_check = Instant::now() + Duration::from_secs(100);
    world.set_faults(&[Fault::always(Way::Interrupt)]);
    world.engine().tick();
    world.set_faults(&[]);
    let engine = world.engine();
    assert!(engine.next_check < Instant::now() + 2 * PAUSE);
    engine.next_check = Instant::now();
    engine.tick();
    assert!(world.enforced().is_empty(), "{}", shown(&world.enforced()));
}

/// The check that repairs a distrusted family deletes its expired rules, and counts them.
#[test]
fn an_expired_rule_is_counted_once() {
    for (sets, is_distrusted) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut world = World::new(sets, false);
        world.put("+60 /drop/input/any/1.1.1.1");
        world.settle();
        world.pass(70);
        if is_distrusted {
            world.engine().distrusted.insert(Family::V4);
        }
        for _ in 0..2 {
            world.engine().next_check = Instant::now();
            world.engine().tick();
        }
        assert_eq!(world.metrics.expired.to_string(), "1", "{sets} {is_distrusted}");
    }
}

/// The same for a change that was refused and took effect: "undone as soon as possible".
#[test]
fn a_refused_change_waits_for_a_late_check() {
    let mut world = World::new(false, true);
    world.engine().next_check = Instant::now() + Duration::from_secs(100);
    let faults = [Fault::new(1, 1, Way::DoAndInterrupt), Fault::new(2, usize::MAX, Way::Interrupt)];
    world.set_faults(&faults);
    assert!(world.commit(&parse("+ /drop/input/any/1.1.1.1")[0])[0].is_err());
    world.set_faults(&[]);
    world.engine().tick();
    assert!(world.enforced().is_empty(), "{}", shown(&world.enforced()));
}

/// A repair that fails is attempted every second, whatever it costs.
#[test]
fn a_repair_that_fails_is_not_attempted_every_second() {
    let mut world = World::new(false, false);
    world.put("+ /drop/input/any/1.1.1.1");
    world.settle();
    flush(&mut world);
    world.set_faults(&[Fault { only_writes: true, ..Fault::always(Way::Interrupt) }]);
    world.memory().delay = Some((Part::Rules(Family::V4), Duration::from_millis(50)));
    let engine = world.engine();
    engine.next_check = Instant::now();
    engine.tick();
    assert!(engine.outage.is_some());
    let pause = engine.next_check.saturating_duration_since(Instant::now());
    assert!(pause > Duration::from_secs(1), "{pause:?} after a failed check of 0.1 s");
}

/// Timeouts that are corrected count as rules that someone else had removed: here on a router that
/// booted in 1970, with a set from the state file, when the clock is set.
#[test]
fn a_timeout_that_is_corrected_was_not_removed_by_someone() {
    let mut world = World::new(true, true);
    world.put("+600 /drop/input/any/1.1.1.1");
    world.settle();
    assert_eq!(world.start(), Ok(()));
    let engine = world.engine();
    // The start at a time when the clock showed 1970
    engine.clock.follow(Duration::from_secs(1_000));
    engine.begin();
    engine.is_starting = true;
    engine.distrusted.extend(Family::ALL);
    engine.settle(&Family::ALL, None).unwrap();
    engine.is_starting = false;
    world.settle();
    assert_eq!(world.metrics.restored.to_string(), "0");
}

/// What waits for a check gets the error of a program that hung, but not one that ip6tables reported
/// while iptables was slow: 503, not 500.
#[test]
fn what_waits_for_a_check_is_not_rejected() {
    let mut world = World::new(false, false);
    let engine = world.engine();
    let (hung, rejected) =
        (ToolError::Transient("hung".into()), ToolError::Rejected("rejected".into()));
    engine.begin();
    assert_eq!(engine.hung(Some(hung.clone())), None);
    engine.deadline = Instant::now() + BATCH_LIMIT - TOOL_LIMIT;
    assert_eq!(engine.hung(Some(rejected)), None);
    assert_eq!(engine.hung(Some(hung.clone())), Some(hung));
}

/// A source that was deleted kept its sets until a restart, and nobody else got one.
#[test]
fn empty_sets_keep_no_others_out() {
    let [rejected, done] = [Way::Reject, Way::DoAndInterrupt].map(|way| Fault::new(1, 2, way));
    for fault in [vec![], vec![rejected], vec![done]] {
        let mut world = World::new(true, false);
        let all = |verb| {
            let changes = (1..MANY_SETS).map(|n| format!("{verb} /drop/input/eth{n}/1.1.1.1"));
            changes.collect::<Vec<_>>().join(", ")
        };
        world.put(&format!("{}; {}", all("+"), all("-")));
        world.settle();
        assert_eq!(world.engine().list.sets().count(), MANY_SETS - 1);
        world.put("+ /drop/input/any/1.1.1.1");
        if fault.is_empty() {
            world.engine().begin();
            world.engine().destroy_empty_sets();
            assert_eq!(world.memory().sets.len(), 1, "without a check");
        }
        world.set_faults(&fault);
        world.settle();
        assert_eq!(world.engine().list.sets().count(), 1, "{fault:?}");
        world.set_faults(&[]);
        world.put(&all("+"));
        world.settle();
    }
}

/// Someone changes the rules between the listing and the first write of a start.
#[test]
fn a_start_survives_a_flush_between_listing_and_write() {
    let mut world = World::new(false, true);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/input/any/1.1.1.2; - /drop/input/any/1.1.1.2");
    // The next start must move a rule that a flush removes meanwhile.
    world.memory().chain(Family::V4, Chain::Input).reverse();
    world.memory().flush_after_reads = 4;
    let started = world.start();
    assert_eq!(started, Ok(()));
}

/// A check that cannot read a large set in time changes nothing, but from then on every change is
/// refused, and no rule expires.
#[test]
fn a_set_that_a_check_cannot_read_still_takes_changes() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.1; +60 /drop/forward/any/1.1.1.1/any/2.2.2.2");
    world.settle();
    world.memory().are_sets_unreadable = true;
    world.put("+ /drop/input/any/1.1.1.2");
    assert!(world.tick(), "the check fails");
    let results = world.engine().commit(&parse("+ /drop/input/any/1.1.1.3")[0]);
    assert!(results[0].is_ok(), "{results:?}");
}

/// The time limit of ipset does not grow with the set, as that of iptables does with its rules.
#[test]
fn the_time_to_read_a_set_grows_with_it() {
    let mut world = World::new(true, false);
    world.engine().list.sets = world.model.sets.then_some(1_000);
    let nets: Vec<String> = (0..1_000).map(|n| format!("4.4.{}.{}", n / 256, n % 256)).collect();
    world.put(&format!("+ /drop/input/any: {}", nets.join(" ")));
    world.settle();
    world.memory().limit = Duration::ZERO;
    let engine = world.engine();
    (engine.next_check, engine.next_sets_check) = (Instant::now(), Instant::now());
    engine.tick();
    let limit = world.memory().limit;
    assert!(limit > TOOL_LIMIT, "{limit:?} for a set of 1,000");
}

/// Foreign rules come first in both families, once a minute, as while Docker restarts a container: the
/// check moves IPv4, which restarts the minute, so that IPv6 waits for good.
#[test]
fn a_family_that_is_overtaken_does_not_starve_the_other() {
    let mut world = World::new(false, false);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/input/any/2001:db8::1");
    world.settle();
    for _ in 0..10 {
        world.insert_foreign(Family::V4, Chain::Input, 1, "-j DOCKER");
        world.tick();
    }
    for _ in 0..20 {
        // Another minute
        for at in world.engine().overtaken.values_mut().flatten() {
            *at = at.checked_sub(Duration::from_secs(31)).unwrap();
        }
        for family in Family::ALL {
            world.insert_foreign(family, Chain::Input, 1, "-j DOCKER");
        }
        world.tick();
        for at in world.engine().overtaken.values_mut().flatten() {
            *at = at.checked_sub(Duration::from_secs(30)).unwrap();
        }
        world.tick();
    }
    // 20 minutes later
    let foreign = world.chain(Family::V6, Chain::Input);
    let foreign = foreign.iter().take_while(|row| matches!(row, FakeRow::Foreign(_))).count();
    assert!(foreign <= 1, "{foreign} foreign rules in front, for {foreign} minutes");
}

/// After ten moves, a check leaves foreign rules in front for a minute: a block that was answered with
/// 200 had no effect until then.
#[test]
fn a_block_behind_foreign_rules_waits_for_no_check() {
    let mut world = World::new(false, false);
    for n in 0..12 {
        world.insert_foreign(Family::V4, Chain::Input, 1, "-j ACCEPT");
        world.put(&format!("+ /drop/input/any/1.1.1.{n}"));
        world.tick();
    }
    world.insert_foreign(Family::V4, Chain::Input, 1, "-j ACCEPT");
    world.tick();
    assert!(matches!(world.chain(Family::V4, Chain::Input)[0], FakeRow::Foreign(_)));
    world.put("+ /drop/input/any/2.2.2.2");
    assert!(matches!(world.chain(Family::V4, Chain::Input)[0], FakeRow::Own(_)));
}

/// rfw counted over the guards to insert a rule, so it was behind a foreign ACCEPT in front of these: a
/// block that was answered with 200 had no effect until the next check.
#[test]
fn a_block_behind_the_guards_precedes_foreign_rules() {
    let both = "+ /drop/forward/any/2.2.2.2/any/3.3.3.3";
    for (sets, change) in [(false, "+ /drop/input/any/2.2.2.2"), (true, both)] {
        let mut world = World::new(sets, false);
        world.put("+ /drop/input/any/1.1.1.1; + /drop/forward/any/1.1.1.1");
        world.settle();
        for chain in [Chain::Input, Chain::Forward] {
            world.insert_foreign(Family::V4, chain, 1, "-j ACCEPT");
        }
        world.put(change);
        world.settle();
    }
}

/// One set that the kernel did not fill kept the guards and all rules of its family from being restored,
/// and rules from expiring.
#[test]
fn a_set_that_cannot_be_filled_does_not_keep_the_rules_from_repair() {
    let mut world = World::new(true, false);
    world.put(
        "+ /drop/input/any/1.1.1.1; + /drop/output/any/1.1.1.2; \
         +60 /drop/forward/any/5.5.5.5/any/6.6.6.6; + /drop/forward/any/7.7.7.7/any/6.6.6.6",
    );
    world.settle();
    let right = world.memory().chains.clone();
    world.memory().bad = Net::parse("1.1.1.2");
    world.memory().sets.get_mut("rfw4:drop:out:any").unwrap().entries.clear();
    world.tick();
    flush(&mut world);
    assert!(world.tick(), "the set cannot be repaired");
    assert_eq!(format!("{:?}", world.memory().chains), format!("{right:?}"));
    // Nor one that cannot be created.
    flush(&mut world);
    world.memory().sets.remove("rfw4:drop:out:any");
    world.memory().bad_set = Some("rfw4:drop:out:any".into());
    assert!(world.tick(), "the set cannot be created");
    let mut others = right.clone();
    others.get_mut(&(Family::V4, Chain::Output)).unwrap().truncate(2 + 1);
    assert_eq!(format!("{:?}", world.memory().chains), format!("{others:?}"));
    world.memory().bad_set = None;
    world.pass(120);
    world.tick();
    let is_due = |rows: &[FakeRow]| format!("{rows:?}").contains("5.5.5.5");
    assert!(!is_due(&world.chain(Family::V4, Chain::Forward)), "it has expired");
    assert_eq!(world.chain(Family::V4, Chain::Forward).len(), 1);
    world.memory().bad = None;
    world.settle();
}

/// If ipset failed altogether, one refused change and a flush left the kernel without guards.
#[test]
fn rules_are_repaired_while_ipset_fails() {
    for way in [Way::Reject, Way::Interrupt] {
        let mut world = World::new(true, false);
        world.put("+ /drop/input/any/1.1.1.1; + /drop/forward/any/7.7.7.7/any/6.6.6.6");
        world.settle();
        let right = world.memory().chains.clone();
        world.set_faults(&[Fault { part: Some(Part::Sets), ..Fault::always(way) }]);
        let results = world.engine().commit(&parse("+ /drop/input/any/1.1.1.2")[0]);
        assert!(results[0].is_err(), "{results:?}");
        flush(&mut world);
        assert!(world.tick(), "the sets cannot be checked");
        assert_eq!(format!("{:?}", world.memory().chains), format!("{right:?}"));
        world.set_faults(&[]);
        world.settle();
    }
}

/// A set of the list, rfw4:drop:out:any, that the kernel does not fill.
fn fail_a_set(world: &mut World) {
    world.memory().bad = Net::parse("1.1.1.2");
    world.memory().sets.get_mut("rfw4:drop:out:any").unwrap().entries.clear();
    assert!(world.tick(), "the set cannot be repaired");
}

/// Returns how often rfw moved its rules in 20 ticks, before each of which another rule precedes them.
fn overtaken_at_every_tick(world: &mut World) -> String {
    for _ in 0..20 {
        world.insert_foreign(Family::V4, Chain::Input, 1, "-j DOCKER");
        world.tick();
    }
    world.metrics.overtaken.to_string()
}

/// A rule that moves is deleted and inserted. If one list of sets lacked its set, it was only deleted.
#[test]
fn a_rule_moves_although_its_set_is_not_listed() {
    for first in 1..=12 {
        let mut world = World::new(true, false);
        world.put("+ /drop/input/any/1.1.1.1; + /drop/output/any/1.1.1.2");
        world.settle();
        fail_a_set(&mut world);
        world.insert_foreign(Family::V4, Chain::Input, 1, "-j ACCEPT");
        let fault = Fault::new(first, 1, Way::Lie(Lie::Empty));
        world.set_faults(&[Fault { part: Some(Part::Sets), ..fault }]);
        world.tick();
        let input = format!("{:?}", world.chain(Family::V4, Chain::Input));
        assert!(input.contains("Set("), "{first}: {input}");
        world.memory().bad = None;
        world.set_faults(&[]);
        world.settle();
    }
}

/// A family whose sets took long to read, with one set that failed, had no time left for its rules.
#[test]
fn rules_are_repaired_before_sets_are_read() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.1");
    world.settle();
    flush(&mut world);
    world.engine().distrusted.insert(Family::V4);
    world.set_faults(&[]);
    world.tick();
    let calls = world.memory().calls.clone();
    let first = calls.iter().position(|(_, call)| *call == Call::WriteRules).unwrap();
    let read = calls[..first].iter().filter(|(part, _)| *part == Part::Sets).count();
    // The names of all sets twice, and the only set of the other family, which is due.
    assert_eq!(read, 3, "{calls:?}");
}

/// If the kernel rejected one rule, as without the module of its target, a flush left it without guards,
/// and no rule expired.
#[test]
fn a_rule_that_is_rejected_keeps_neither_guards_nor_expiry_from_repair() {
    let mut world = World::new(false, false);
    world.put(
        "+ /drop/input/any/1.1.1.1; + /drop/input/any/1.1.1.2; +60 /accept/forward/any/5.5.5.5",
    );
    world.settle();
    world.memory().bad = Net::parse("1.1.1.2");
    world.memory().chain(Family::V4, Chain::Input).clear();
    world.pass(120);
    for _ in 0..3 {
        assert!(world.tick(), "the rule is rejected");
    }
    assert_eq!(world.chain(Family::V4, Chain::Input).len(), 3);
    assert_eq!(world.chain(Family::V4, Chain::Forward).len(), 0);
    world.memory().bad = None;
    world.settle();
}

/// While one set failed, rfw moved its rules to the front at every check, and each WARNING said that it
/// waits a minute.
#[test]
fn overtaken_often_while_a_set_fails() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/output/any/1.1.1.2");
    world.settle();
    fail_a_set(&mut world);
    assert_eq!(overtaken_at_every_tick(&mut world), "10");
}

/// The same if the rule of that set is missing, too.
#[test]
fn overtaken_often_while_a_set_is_missing() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/input/any/1.1.1.2@bad");
    world.settle();
    let name = world.memory().sets.keys().find(|name| name.contains("bad")).unwrap().clone();
    world.memory().sets.remove(&name);
    world.memory().bad_set = Some(name.clone());
    world.memory().chain(Family::V4, Chain::Input).retain(|row| match row {
        FakeRow::Own(tagged) => tagged.rule.to_string() != name,
        FakeRow::Foreign(_) => true,
    });
    assert!(world.tick(), "the set cannot be repaired");
    assert_eq!(overtaken_at_every_tick(&mut world), "10");
}

/// A rewrite that was committed and then failed was followed by another from the same listing: for one
/// check, every guard was there twice.
#[test]
fn a_rewrite_that_seems_to_fail_is_not_repeated() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/output/any/1.1.1.2");
    world.settle();
    let right = world.memory().chains.clone();
    fail_a_set(&mut world);
    for first in 1..=6 {
        flush(&mut world);
        let fault = Fault { only_writes: true, ..Fault::new(first, 1, Way::DoAndReject) };
        world.set_faults(&[Fault { part: Some(Part::Rules(Family::V4)), ..fault }]);
        world.tick();
        assert_eq!(format!("{:?}", world.memory().chains), format!("{right:?}"), "{first}");
    }
}

/// The expiry of a change between a step of the clock and the next tick counted from the old time. If
/// rfw was killed by then, the change was lost.
#[test]
fn a_change_after_the_clock_was_set() {
    let mut world = World::new(false, true);
    world.put("+ /drop/input/any/1.1.1.1");
    world.engine().clock.follow(clock::wall() - Duration::from_secs(100_000));
    world.engine().commit(&parse("+600 /drop/input/any/2.2.2.2")[0]);
    world.start().unwrap();
    let rule: Rule = "/drop/input/any/2.2.2.2".parse().unwrap();
    assert!(world.engine().list.contains(&rule));
}

/// The timeout of a refresh that was refused stayed in the kernel, if it differed by three seconds.
#[test]
fn a_refused_refresh_does_not_stay_in_the_kernel() {
    let mut world = World::new(true, false);
    world.put("+60 /drop/input/any/1.1.1.1");
    world.settle();
    let expiry = |world: &World| {
        let memory = world.memory();
        memory.sets["rfw4:drop:in:any"].entries[&Net::parse("1.1.1.1").unwrap()]
    };
    let before = expiry(&world);
    world
        .set_faults(&[Fault { part: Some(Part::Rules(Family::V4)), ..Fault::always(Way::Reject) }]);
    let results = world.engine().commit(&parse("+62 /drop/input/any/1.1.1.1")[0]);
    assert!(results[0].is_err(), "{results:?}");
    assert_eq!(expiry(&world), before);
    world.set_faults(&[]);
    world.settle();
}

/// One program that failed ended the start: iptables-legacy waits five seconds for the xtables lock, and
/// ENOBUFS may come from any listing.
#[test]
fn a_start_survives_one_program_that_fails() {
    for (sets, has_file) in [(false, false), (false, true), (true, false), (true, true)] {
        for before in ["", "+ /drop/input/any/1.1.1.1; + /drop/input/any/2001:db8::1"] {
            let mut world = World::new(sets, has_file);
            world.put(before);
            for part in [Part::Rules(Family::V4), Part::Rules(Family::V6), Part::Sets] {
                for first in 1..=20 {
                    let fault = Fault { part: Some(part), ..Fault::new(first, 1, Way::Interrupt) };
                    world.set_faults(&[fault]);
                    assert_eq!(world.start(), Ok(()), "{sets} {has_file} {before}: {fault:?}");
                    world.settle();
                }
            }
        }
    }
}

/// Sets may hold more addresses than rfw and iptables can keep as rules. Without ipset.path, they
/// became rules: no listing was complete after that, and no start succeeded.
#[test]
fn a_start_refuses_more_rules_than_it_can_keep() {
    let mut world = World::new(false, true);
    world.engine = None;
    let path = world.directory.clone().unwrap().join("state");
    let line = |n: u32| {
        format!("+ 0 /drop/input/any/{}\n", std::net::Ipv4Addr::from_bits(0x1400_0000 + n))
    };
    let lines: String = (0..=100_000).map(line).collect();
    fs::write(&path, format!("rfw state 2\n{lines}")).unwrap();
    world.set_faults(&[]);
    let error = world.start().unwrap_err();
    assert!(error.contains("more than 100000 IPv4 rules; set ipset.path"), "{error}");
    assert_eq!(world.memory().writes(), 0);
}

/// The names of sets are compared when a rule is put, with sets. Two rules that had been put without them
/// were repaired into the same set, in turn.
#[test]
fn a_start_refuses_two_sets_of_one_name() {
    let mut world = World::new(false, true);
    let evil = "/drop/forward/xjhyoswz0/9.9.9.9/6bvXNP3Fh-0/0.0.0.0@evil";
    world.put(&format!("+ /drop/forward/any/1.1.1.1@crowdsec; + {evil}"));
    world.model.sets = true;
    world.set_faults(&[]);
    let error = world.start().unwrap_err();
    let both = format!("that of /drop/forward/any/1.1.1.1@crowdsec and that of {evil};");
    assert!(error.contains(&both), "{error}");
    assert_eq!(world.memory().writes(), 0);
}

/// In a rootless container, iptables-nft takes some 380 rules per transaction: those that were
/// inserted one by one were lost after a flush or a reboot, and rfw did not start any more.
#[test]
fn rules_that_one_transaction_cannot_hold_are_restored() {
    let mut world = World::new(false, true);
    let nets: Vec<String> = (0..1000).map(|n| format!("4.4.{}.{}", n / 250, n % 250)).collect();
    world.put(&format!("+60 /drop/input/any: {}; + /drop/input/any/1.1.1.1", nets.join(" ")));
    world.settle();
    world.memory().max_edits = Some(200);
    flush(&mut world);
    world.start().unwrap();
    assert_eq!(world.enforced().len(), 1001);
    flush(&mut world);
    world.tick();
    assert_eq!(world.enforced().len(), 1001);
    let nets: Vec<String> = (0..1000).map(|n| format!("5.5.{}.{}", n / 250, n % 250)).collect();
    world.put(&format!("+60 /accept/input/any: {}", nets.join(" ")));
    assert_eq!(world.enforced().len(), 2001);
    world.pass(70);
    world.settle();
    assert_eq!(shown(&world.enforced()), "/drop/input/any/1.1.1.1 0");
}

/// If addresses expired faster than a large set could be read, no two listings agreed: rfw did not start
/// and, after one error, refused every change.
#[test]
fn addresses_that_expire_between_two_listings() {
    let mut world = World::new(true, false);
    world.put(
        "+ /drop/input/any/1.1.1.1; +60 /drop/input/any: 2.2.2.1 2.2.2.2 2.2.2.3 2.2.2.4 2.2.2.5",
    );
    world.pass(60);
    let sets = world.memory().sets.clone();
    world.memory().is_one_due = true;
    world.engine().distrusted.insert(Family::V4);
    assert_eq!(world.engine().repair_sets(Family::V4, None).err(), None);
    world.memory().sets = sets;
    assert_eq!(world.start(), Ok(()));
}

/// Addresses of a set that takes long to read expired that much earlier after a start without a state
/// file.
#[test]
fn a_set_that_is_read_slowly_expires_no_earlier() {
    let mut world = World::new(true, false);
    world.put("+600 /drop/input/any/1.1.1.1");
    let expiry = |list: &List| list.stored().next().unwrap().1;
    world.memory().delay = Some((Part::Sets, Duration::from_secs(1)));
    let engine = world.engine();
    let listing = engine.read_rules(Family::V4).unwrap();
    let adopted = start::adopt(engine, &[(Family::V4, listing)]).unwrap();
    let (before, after) = (expiry(&engine.list), expiry(&adopted));
    assert!(after >= before, "{before:?} became {after:?}");
}

/// If one set could not be read, those after it were not repaired, and those before it were not counted.
#[test]
fn a_set_that_fails_keeps_no_other_from_being_repaired() {
    let write = |first| Fault { only_writes: true, ..Fault::new(first, 1, Way::Reject) };
    let read = |first| Fault::new(first, 1, Way::Interrupt);
    // The headers, then each set twice, and what it lacks
    for fault in [read(2), read(3), write(4), read(5), read(6), write(7)] {
        let mut world = World::new(true, false);
        world.put("+ /accept/input/any/1.1.1.1; + /drop/input/any/2.2.2.2");
        world.settle();
        empty_sets(&mut world);
        world.set_faults(&[Fault { part: Some(Part::Sets), ..fault }]);
        let engine = world.engine();
        engine.begin();
        assert!(engine.repair_sets(Family::V4, None).is_err(), "{fault:?}");
        assert_eq!(world.enforced().len(), 1, "{fault:?}");
        world.settle();
        assert_eq!(world.metrics.restored.to_string(), "2", "{fault:?}");
    }
}

/// A PUT of a rule that existed was answered with 200 though its state file was gone.
#[test]
fn a_rule_that_exists_is_on_the_disk() {
    let mut world = World::new(false, true);
    world.put("+ /drop/input/any/1.1.1.1");
    let path = world.directory.clone().unwrap().join("state");
    fs::rename(&path, path.with_extension("old")).unwrap();
    let results = world.commit(&parse("+ /drop/input/any/1.1.1.1")[0]);
    assert!(matches!(results[0], Err(ApiError::State(_))), "{results:?}");
    fs::rename(path.with_extension("old"), &path).unwrap();
    world.put("+ /drop/input/any/1.1.1.1");
    world.settle();
}

/// A check deleted the rule of the set that a refused change had made, before it put the address back.
#[test]
fn a_refused_move_leaves_no_gap() {
    for first in 1..8 {
        let mut world = World::new(true, false);
        world.put("+ /drop/input/any/1.1.1.1");
        world.settle();
        world.memory().watched = Net::parse("1.1.1.1");
        let hangs = Fault::new(first, 1, Way::DoAndInterrupt);
        world.set_faults(&[Fault { part: Some(Part::Sets), only_writes: true, ..hangs }]);
        let changes = parse("+ /reject/input/any/1.1.1.1");
        let engine = world.engine();
        engine.deadline = Instant::now() + BATCH_LIMIT - TOOL_LIMIT;
        let result = engine.attempt(&changes[0].iter().collect::<Vec<_>>());
        engine.begin();
        assert_eq!(engine.check(), Ok(()));
        assert_eq!(world.enforced().len(), 1, "{first} {result:?}");
    }
}

/// The rule of the set that a refused change has made is deleted even if ipset fails, if it accepts.
#[test]
fn a_refused_accept_ends_while_ipset_fails() {
    let mut world = World::new(true, false);
    world.put("+ /drop/input/any/1.1.1.0/24");
    world.settle();
    let written = Fault::new(1, 2, Way::DoAndInterrupt);
    let written = Fault { part: Some(Part::Rules(Family::V4)), only_writes: true, ..written };
    let fails = Fault { part: Some(Part::Sets), ..Fault::new(2, usize::MAX, Way::Reject) };
    world.set_faults(&[written, fails]);
    let engine = world.engine();
    assert!(engine.commit(&parse("+ /accept/input/any/1.1.1.1")[0])[0].is_err());
    engine.begin();
    assert!(engine.check().is_err());
    assert_eq!(shown(&world.enforced()), "/drop/input/any/1.1.1.0/24 0");
}

/// A repair emptied the old set first, and then failed to make the new one.
#[test]
fn a_move_leaves_no_gap() {
    let net = Net::parse("1.1.1.1");
    let new_set = "rfw4:accept:in:any";
    let once = Fault { part: Some(Part::Sets), ..Fault::new(1, 1, Way::Reject) };
    // A set that cannot be created, an address that is rejected, a failure, and the change.
    let table = [
        (Some(new_set), None, None, "+ /accept/input/any/1.1.1.1"),
        (None, Net::parse("7.7.7.7"), None, "+ /accept/input/any: 1.1.1.1 7.7.7.7"),
        (None, None, Some(once), "+ /accept/input/any/1.1.1.1"),
        (None, None, Some(once), "+ /accept/input/any/1.1.1.1, + /drop/input/any/3.3.3.3"),
    ];
    for (bad_set, bad, fault, change) in table {
        let mut world = World::new(true, false);
        world.put("+ /drop/input/any/1.1.1.1");
        world.settle();
        world.memory().bad_set = bad_set.map(String::from);
        world.memory().bad = bad;
        world.memory().watched = net;
        world.set_faults(Vec::from_iter(fault).as_slice());
        let results = world.engine().commit(&parse(change)[0]);
        assert_eq!(results[0].is_ok(), fault.is_some(), "{change}");
    }
    // Killed between the state file and the kernel; the next start completes the move.
    let mut world = World::new(true, true);
    world.put("+ /drop/input/any/1.1.1.1; + /drop/input/any/2.2.2.2");
    world.settle();
    world.engine = None;
    let path = world.directory.clone().unwrap().join("state");
    let text = fs::read_to_string(&path).unwrap();
    let moved = "* 2\n- /drop/input/any/1.1.1.1\n+ 0 /reject/input/any/1.1.1.1\n";
    fs::write(&path, format!("{text}{moved}")).unwrap();
    world.memory().watched = net;
    world.start().unwrap();
    assert_eq!(world.memory().sets["rfw4:drop:in:any"].entries.len(), 1);
}
