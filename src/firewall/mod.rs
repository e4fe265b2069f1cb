//! The command function: one Mutex, one batch at a time, one answer for each
//! request.
//!
//! A thread that wants a change queues it. The first one leads: it takes the
//! Mutex, commits everything that is queued by then as one batch, for the
//! others too, gives out the answers, and passes the lead to the next in line.
//! A list is a batch of its own, because it is applied as a whole or not at all.

pub mod exec;
pub mod ipset;
pub mod kernel;
pub mod mirror;
mod sets;

use crate::clock::{self, Clock};
use crate::http::auth::Client;
use crate::http::refusal::Refusal;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::rule::net::{Family, Net};
use crate::rule::whitelist::{Permitted, Whitelist};
use crate::rule::{Action, Chain, Change, Iface, Rule, Rules, Scope, Target};
use crate::state::{Kept, State};
use exec::Failure;
use ipset::{Entry, Ipset};
use kernel::{Edit, Kind, LIMIT, Line, Owned, START_LIMIT, Tools};
use mirror::{Batch, Law, Listing, Mirror, Note, REAL_TIME, moved};
use std::collections::HashMap;
use std::mem;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// The least time between two looks at the kernel, and how many times as long
/// as a look takes the pause behind it is: one look in twenty-one parts is
/// under 5 % of one processor.
const PAUSE: Duration = Duration::from_millis(900);
const PAUSE_FACTOR: u32 = 20;

/// The longest pause behind a look that failed.
const FAILED_PAUSE: Duration = Duration::from_secs(10);
/// How long a set may be read for a client; its answer has a little less.
const SEND_LIMIT: Duration = Duration::from_secs(70);
/// How many rules of one family rfw keeps: iptables-nft takes seconds to list so
/// many, and what cannot be listed can be neither checked nor repaired.
const MAX_RULES: usize = 100_000;
const MANY_RULES: &str = "rfw keeps 100,000 rules at most; for more set ipset.path in rfw.conf.";

/// What is said of a list that failed.
const NOTHING: &str = " Nothing of the list is applied.";
const WHOLE: &str = " The list is applied as a whole or not at all, once ipset works.";

/// What became of a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Inserted,
    /// The rule was there; it has a new expiry and stands in front.
    Refreshed,
    Exists,
    Deleted,
    Absent,
}

impl Verdict {
    const ALL: [Verdict; 5] =
        [Verdict::Inserted, Verdict::Refreshed, Verdict::Exists, Verdict::Deleted, Verdict::Absent];

    /// The word in answers and in the log.
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

/// How many rules of a change have met which verdict.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Tally([usize; 5]);

impl Tally {
    pub fn of(&self, verdict: Verdict) -> usize {
        self.0.get(verdict as usize).copied().unwrap_or(0)
    }

    /// That of a single rule.
    pub fn single(&self) -> Option<Verdict> {
        Verdict::ALL.into_iter().find(|verdict| self.of(*verdict) > 0)
    }

    pub fn add(&mut self, verdict: Verdict, count: usize) {
        if let Some(sum) = self.0.get_mut(verdict as usize) {
            *sum = sum.saturating_add(count);
        }
    }

    fn join(&mut self, other: &Tally) {
        Verdict::ALL.into_iter().for_each(|verdict| self.add(verdict, other.of(verdict)));
    }
}

/// The answer to a change that the kernel has taken.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub tally: Tally,
    /// Unix seconds.
    pub expires: Option<u64>,
}

/// A change that waits, and the way to who waits for it.
struct Job {
    change: Change,
    waiter: Sender<Turn>,
}

/// What a waiting thread is told.
enum Turn {
    Lead,
    Answer(Result<Outcome, Failure>),
}

#[derive(Default)]
struct Queue {
    jobs: Vec<Job>,
    /// Whether some thread leads, and will tell all others.
    led: bool,
}

/// The kernel's tables as far as they are rfw's.
pub struct Firewall {
    queue: Mutex<Queue>,
    kernel: Mutex<Kernel>,
    tools: Vec<Tools>,
    ipset: Option<Ipset>,
}

/// What the Mutex guards.
struct Kernel {
    tables: Vec<Table>,
    /// Keeps addresses, where rfw.conf says so.
    ipset: Option<Ipset>,
    /// Keeps the list over a reboot, where rfw.conf says so.
    state: Option<State>,
    /// Where the state file ends if a list that is unsettled comes to nothing.
    doubtful: Option<u64>,
    /// At most so many entries are in a set.
    fill: HashMap<Line, usize>,
    /// Whether something may be left of a list, since ipset was ended in the middle.
    unsettled: bool,
    clock: Clock,
    log: Arc<Log>,
    metrics: Arc<Metrics>,
    next_look: Instant,
    /// Why the last look failed: the log is told when that changes.
    told: Option<Failure>,
}

/// The rules of one family.
struct Table {
    tools: Tools,
    mirror: Mirror,
    whitelist: Arc<Whitelist>,
    log: Arc<Log>,
    metrics: Arc<Metrics>,
    /// Whether nobody knows what the kernel holds, since a program was ended
    /// in the middle.
    stale: bool,
}

impl Firewall {
    /// Makes the kernel hold what the state file names or, without one, reads what it
    /// holds of rfw's, and puts the guard rules of the outward server's port there.
    /// A file that is new names nothing yet. The error is a sentence.
    pub fn start(
        tools: Vec<Tools>,
        ipset: Option<Ipset>,
        state: Option<(State, Option<Vec<Kept>>)>,
        guarded: Option<u16>,
        whitelist: Arc<Whitelist>,
        log: Arc<Log>,
        metrics: Arc<Metrics>,
    ) -> Result<Firewall, String> {
        let (clock, next_look) = (Clock::start(), Instant::now());
        let (mut state, kept) = state.unzip();
        let kept = kept.flatten().map(|mut kept| {
            kept.retain(|(_, expires)| expires.is_none_or(|second| second > clock.now().as_secs()));
            let kept = without_whitelisted(kept, &mut state, &whitelist, &log);
            if ipset.is_some() { sets::without_rivals(kept, &mut state, &log) } else { kept }
        });
        let (lines, fill) = match (&kept, &ipset) {
            (None, _) => (None, HashMap::new()),
            (Some(kept), None) => (Some(sets::all_plain(kept)), HashMap::new()),
            (Some(kept), Some(ipset)) => {
                let filled = sets::fill(ipset, kept, clock.now());
                let (lines, fill) = filled.map_err(|failure| sets::no_sets(&failure))?;
                (Some(lines), fill)
            }
        };
        // Both at once: with many rules this is what a start waits for.
        let tables = thread::scope(|scope| {
            let begin = |tools| {
                let (whitelist, log, metrics) = (whitelist.clone(), log.clone(), metrics.clone());
                let mirror = Mirror::default();
                let table = Table { tools, mirror, whitelist, log, metrics, stale: false };
                let now = clock.now().as_secs();
                let lines = lines.as_deref();
                scope.spawn(move || table.begin(guarded, lines, now))
            };
            let threads: Vec<_> = tools.into_iter().map(begin).collect();
            let begun = threads.into_iter().flat_map(ScopedJoinHandle::join);
            begun.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()
        })?;
        let tools = tables.iter().map(|table| table.tools.clone()).collect();
        let (told, unsettled, doubtful, sets) = (None, false, None, ipset.clone());
        let mut kernel = Kernel {
            tables,
            ipset: sets,
            state,
            doubtful,
            fill,
            unsettled,
            clock,
            log,
            metrics,
            next_look,
            told,
        };
        kernel.begin_sets(kept.is_some())?;
        if kept.is_none() {
            kernel.begin_state()?;
        }
        Ok(Firewall { queue: Mutex::default(), kernel: Mutex::new(kernel), tools, ipset })
    }

    /// Carries out a change. When it returns, the kernel has taken it, or
    /// nothing of it.
    pub fn apply(&self, _client: &Client, change: Permitted) -> Result<Outcome, Refusal> {
        let change = change.into_change();
        let filtered = |family| self.tools.iter().any(|tools| tools.family == family);
        if Family::ALL.iter().any(|f| !filtered(*f) && change.rules.of(*f).next().is_some()) {
            return Err(Refusal::NoIpv6);
        }
        let (waiter, turns) = mpsc::channel();
        let mut queue = lock(&self.queue);
        queue.jobs.push(Job { change, waiter });
        let leads = !mem::replace(&mut queue.led, true);
        drop(queue);
        if leads {
            self.lead();
        }
        loop {
            match turns.recv() {
                Ok(Turn::Lead) => self.lead(),
                Ok(Turn::Answer(result)) => return result.map_err(refusal),
                Err(_) => return Err(Refusal::Busy("The change was not carried out.".into())),
            }
        }
    }

    /// Commits everything that waits, and passes the lead on.
    fn lead(&self) {
        let mut kernel = lock(&self.kernel);
        let jobs = mem::take(&mut lock(&self.queue).jobs);
        let (changes, waiters): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| (job.change, job.waiter)).unzip();
        let (results, ill) = kernel.commit(&changes);
        for (waiter, result) in waiters.iter().zip(results) {
            let _ = waiter.send(Turn::Answer(result));
        }
        self.give_up_waiting(ill);
        drop(kernel);
        let mut queue = lock(&self.queue);
        queue.led = queue.jobs.first().is_some_and(|next| next.waiter.send(Turn::Lead).is_ok());
    }

    /// Where a program hung, those who queued meanwhile get the same answer:
    /// nobody waits for the time limit twice.
    fn give_up_waiting(&self, ill: Option<Failure>) {
        let Some(failure) = ill else { return };
        for job in mem::take(&mut lock(&self.queue).jobs) {
            let _ = job.waiter.send(Turn::Answer(Err(failure.clone())));
        }
    }

    /// Reads every rule of rfw's but the guard rules from the kernel, each with
    /// its place among all rules of its chain, counted from 1. It is read whole
    /// before a byte of it is sent: iptables-legacy holds the xtables lock
    /// until its output is read, and no client may hold that.
    pub fn list(
        &self,
        _client: &Client,
        chain: Option<Chain>,
    ) -> Result<Vec<(usize, Owned)>, Refusal> {
        // A set may go after iptables has read its rule and before it asks for the set's name.
        let gone = |failure: &Failure| failure.to_string().contains("in kernel doesn't exist");
        let list = match self.try_list(chain) {
            Err(failure) if gone(&failure) => self.try_list(chain),
            result => result,
        };
        list.map_err(refusal)
    }

    fn try_list(&self, chain: Option<Chain>) -> Result<Vec<(usize, Owned)>, Failure> {
        let mut list = Vec::new();
        for tools in &self.tools {
            let mut places = HashMap::new();
            let row = |chain, row: Option<Owned>| {
                let place: &mut usize = places.entry(chain).or_default();
                *place = place.saturating_add(1);
                let listed = row.filter(|owned| !owned.line.is_guard());
                list.extend(listed.map(|owned| (*place, owned)));
                true
            };
            tools.list(chain, true, LIMIT, row)?;
        }
        Ok(list)
    }

    /// Reads the entries of a set, whose rule stands for them in the list, until
    /// `each` says `false`; and when each of them expires. No Mutex is held.
    pub fn entries(&self, set: &Line, mut each: impl FnMut(&Owned) -> bool) -> Result<(), Refusal> {
        let (Some(ipset), Some(place)) = (&self.ipset, set.place()) else { return Ok(()) };
        let now = clock::wall();
        let each = |entry: Entry| each(&entry.owned(place, now));
        ipset.entries(&set.to_string(), SEND_LIMIT, each).map_err(refusal)
    }

    /// What is to be done every second: follow the wall clock, delete what has
    /// expired, look whether the kernel still holds what it should.
    pub fn tick(&self) {
        let mut kernel = lock(&self.kernel);
        let ticked = kernel.tick();
        self.give_up_waiting(ticked.err());
    }
}

impl Kernel {
    /// Commits changes, in order, and answers each. Rules that come one after
    /// another are one batch. Behind a program that hung, which is told as well, no
    /// other is tried.
    fn commit(&mut self, changes: &[Change]) -> (Vec<Result<Outcome, Failure>>, Option<Failure>) {
        let (now, ipset) = (self.clock.now(), self.ipset.clone());
        let (mut results, mut ill) = (Vec::new(), None);
        for batch in changes.chunk_by(|a, b| !a.is_list() && !b.is_list() && ipset.is_none()) {
            let (committed, words) = match (&ill, &ipset, batch) {
                (Some(failure), ..) => (vec![Err(Failure::clone(failure)); batch.len()], ""),
                (_, Some(ipset), [change]) => {
                    let words = if change.is_list() { WHOLE } else { "" };
                    (vec![self.commit_to_sets(ipset, change, now)], words)
                }
                (_, None, [list]) if list.is_list() => {
                    let (result, words) = self.commit_list(list, now);
                    (vec![result], words)
                }
                _ => (self.commit_rules(batch, now), ""),
            };
            let mut failures = committed.iter().filter_map(|result| result.as_ref().err());
            ill = ill.or(failures.find(|failure| failure.is_passing()).cloned());
            let told = |result: Result<Outcome, Failure>| result.map_err(|f| f.and(words));
            results.extend(committed.into_iter().map(told));
        }
        self.metrics.batches.add(1);
        self.metrics.kernel_failures.add(results.iter().filter(|result| result.is_err()).count());
        (results, ill)
    }

    fn commit_rules(&mut self, batch: &[Change], now: Duration) -> Vec<Result<Outcome, Failure>> {
        let mut results = vec![Ok(Outcome::default()); batch.len()];
        let mut ill = None;
        for table in &mut self.tables {
            let family = table.tools.family;
            let mine = results.iter_mut().zip(batch);
            let (mine, changes): (Vec<_>, Vec<_>) =
                mine.filter(|(_, change)| change.rules.of(family).next().is_some()).unzip();
            let committed = match &ill {
                None => table.commit(&changes, now, &mut self.state),
                Some(failure) => vec![Err(Failure::clone(failure)); changes.len()],
            };
            let mut failures = committed.iter().filter_map(|result| result.as_ref().err());
            ill = ill.or(failures.find(|failure| failure.is_passing()).cloned());
            mine.into_iter().zip(committed).for_each(|(slot, result)| *slot = result);
        }
        results
    }

    /// Applies a list, a transaction for each family. Where the second one
    /// fails, the first one is taken back; what is to be said of that.
    fn commit_list(
        &mut self,
        list: &Change,
        now: Duration,
    ) -> (Result<Outcome, Failure>, &'static str) {
        let (mut outcome, mut taken) = (Outcome::default(), Vec::new());
        let mark = self.state.as_ref().map(State::mark);
        for table in &mut self.tables {
            match table.commit_all(&[list], now, &mut self.state) {
                Ok(batch) => {
                    for part in &batch.outcomes {
                        outcome.tally.join(&part.tally);
                        outcome.expires = part.expires;
                    }
                    taken.push((table, batch));
                }
                Err(failure) => {
                    let mut words = NOTHING;
                    cut(&mut self.state, mark);
                    for (table, batch) in taken {
                        table.mirror.undo(&batch);
                        words = match table.repair(&batch, now.as_secs(), false) {
                            Ok(()) => " Nothing of the list is applied: IPv4 was taken back.",
                            Err(_) => " IPv4 will be taken back as soon as iptables works again.",
                        };
                    }
                    return (Err(failure), words);
                }
            }
        }
        (Ok(outcome), "")
    }

    /// The error is a passing one. No other program is tried behind it: who
    /// waits for the Mutex waits for one time limit.
    fn tick(&mut self) -> Result<(), Failure> {
        self.follow_clock();
        let now = self.clock.now();
        for table in &mut self.tables {
            table.expire(now).or_else(only_passing)?;
        }
        if self.doubtful.is_none() && self.state.as_ref().is_some_and(State::is_large) {
            self.compact(now.as_secs(), |second| second);
        }
        let started = Instant::now();
        if started < self.next_look {
            return Ok(());
        }
        let mut failure = self.sweep(now).err();
        for table in &mut self.tables {
            if !failure.as_ref().is_some_and(Failure::is_passing) {
                failure = failure.or(table.look(now).err());
            }
        }
        if let Some(new) = failure.as_ref().filter(|_| failure != self.told) {
            self.log.error(format_args!("cannot check what the kernel holds: {new}"));
        }
        self.metrics.kernel_failures.add(usize::from(failure.is_some()));
        self.count_rules();
        self.told = failure.clone();
        let pause = started.elapsed().saturating_mul(PAUSE_FACTOR);
        let most = if failure.is_some() { FAILED_PAUSE } else { Duration::MAX };
        let pause = pause.min(most).max(PAUSE);
        self.next_look = Instant::now().checked_add(pause).unwrap_or(started);
        failure.map_or(Ok(()), only_passing)
    }

    fn count_rules(&self) {
        for (chain, row) in Chain::ALL.iter().zip(&self.metrics.rules) {
            for (target, number) in Target::ALL.iter().zip(row) {
                let here =
                    |line: &&Line| (line.rule.chain(), line.rule.target) == (*chain, *target);
                let lines = self.tables.iter().flat_map(|table| table.mirror.lines());
                let count = lines.filter(here).map(|line| match line.kind {
                    Kind::Plain => 1,
                    Kind::Guard(_) => 0,
                    Kind::Set(_) => self.fill.get(line).copied().unwrap_or(0),
                });
                number.set(count.sum());
            }
        }
    }

    /// Where the wall clock was set, moves the expiries with it: the kernel's
    /// comments are found different at the next look, and stamped anew.
    fn follow_clock(&mut self) {
        // Compacted, the file could not be cut at the mark any more.
        if self.doubtful.is_some() {
            return;
        }
        let before = self.clock.now().as_secs();
        if let Some(seconds) = self.clock.follow(clock::wall()) {
            self.log.warning(format_args!("the clock was set by {seconds} s; all expiries follow"));
            let moved = |second| moved(second, before, seconds);
            self.tables.iter_mut().for_each(|table| table.mirror.shift(moved));
            self.compact(self.clock.now().as_secs(), moved);
            if before < REAL_TIME {
                self.refill();
            }
            self.next_look = Instant::now();
        }
    }

    fn compact(&mut self, now: u64, moved: impl Fn(u64) -> u64) {
        let Some(state) = &mut self.state else { return };
        if let Err(sentence) = state.compact(now, moved) {
            self.log.error(format_args!("{sentence}"));
        }
    }

    /// Writes a new state file with what the kernel holds.
    fn begin_state(&mut self) -> Result<(), String> {
        let Some(state) = &mut self.state else { return Ok(()) };
        let mut kept: Vec<Kept> = self.tables.iter().flat_map(|t| t.mirror.plain()).collect();
        let now = self.clock.now();
        for line in self.tables.iter().flat_map(|table| table.mirror.sets()) {
            let (Some(ipset), Some(place)) = (&self.ipset, line.place()) else { continue };
            let each = |entry: Entry| {
                let Owned { line, expires, .. } = entry.owned(place, now);
                kept.push((line.rule, expires));
                true
            };
            ipset.entries(&line.to_string(), START_LIMIT, each).map_err(|f| f.to_string())?;
        }
        state.replace(kept.into_iter())
    }
}

impl Table {
    /// Starts it; `None` if this host has no IPv6 to filter.
    fn begin(
        mut self,
        guarded: Option<u16>,
        lines: Option<&[(Line, Option<u64>)]>,
        now: u64,
    ) -> Result<Option<Table>, String> {
        let guards =
            guarded.map_or(Vec::new(), |port| guards(&self.whitelist, self.tools.family, port));
        let law = Law { now, whitelist: &self.whitelist };
        let (mut clean, mut found) = (lines.is_none(), Vec::new());
        let listed = self.tools.list(None, false, START_LIMIT, |_, row| {
            // Where the list is known, it is enough that the kernel can be read.
            if lines.is_some() {
                return false;
            }
            if let Some(owned) = row {
                clean = self.mirror.adopt(&owned, &law) && clean;
                let guard = owned.line.is_guard();
                found.extend(guard.then_some(Owned::new(owned.line, None)));
            }
            true
        });
        match listed {
            Ok(()) => {}
            Err(Failure::Refused(why)) if self.tools.family == Family::V6 => {
                self.log.warning(format_args!("IPv6 rules are not taken: {why}"));
                return Ok(None);
            }
            Err(failure) => {
                let what_to_do = match failure.is_passing() {
                    true => "find out what holds it up, and start rfw again",
                    false => "run rfw as root or with CAP_NET_ADMIN, and check iptables.path",
                };
                return Err(format!("cannot read the kernel's rules ({failure}); {what_to_do}"));
            }
        }
        let mine = |(line, _): &&(Line, _)| line.rule.family() == self.tools.family;
        for (line, expires) in lines.unwrap_or_default().iter().filter(mine) {
            self.mirror.add(*line, *expires);
        }
        let untried = self.mirror.is_empty() && guards.is_empty();
        let mut begun = if untried { probe(&self.tools) } else { Ok(()) };
        if found != guards || !clean {
            self.mirror.guard(&guards);
            begun = begun.and_then(|()| self.repair(&Batch::default(), now, true));
        }
        begun.map_err(|failure| {
            let what_to_do = "the kernel must have the comment match (xt_comment), \
                              and rfw must be root or have CAP_NET_ADMIN";
            format!("the kernel did not take rfw's rules ({failure}); {what_to_do}")
        })?;
        let count = self.mirror.len();
        self.log.info(format_args!("IP{:?}: {count} rules of rfw's", self.tools.family));
        Ok(Some(self))
    }

    /// Commits changes, and answers each. Where the kernel, as long as it can
    /// be read, refuses a batch, each half of it is tried: only bad rules fail.
    fn commit(
        &mut self,
        changes: &[&Change],
        now: Duration,
        state: &mut Option<State>,
    ) -> Vec<Result<Outcome, Failure>> {
        match self.commit_all(changes, now, state) {
            Ok(batch) => batch.outcomes.into_iter().map(Ok).collect(),
            Err(Failure::Refused(_) | Failure::Full(_))
                if changes.len() > 1
                    && self.repair(&Batch::default(), now.as_secs(), false).is_ok() =>
            {
                let (first, second) = changes.split_at(changes.len() / 2);
                let mut results = self.commit(first, now, state);
                results.extend(match results.last() {
                    Some(Err(failure)) if failure.is_passing() => {
                        vec![Err(failure.clone()); second.len()]
                    }
                    _ => self.commit(second, now, state),
                });
                results
            }
            Err(failure) => vec![Err(failure); changes.len()],
        }
    }

    /// All or nothing. What fails is tried again on a mirror made true, because
    /// somebody else may have removed a rule that was to be deleted.
    fn commit_all(
        &mut self,
        changes: &[&Change],
        now: Duration,
        state: &mut Option<State>,
    ) -> Result<Batch, Failure> {
        if self.stale && !changes.is_empty() {
            self.repair(&Batch::default(), now.as_secs(), false)?;
        }
        match self.attempt(changes, now, state) {
            Err(Failure::Refused(_)) => {
                self.repair(&Batch::default(), now.as_secs(), false)?;
                self.attempt(changes, now, state)
            }
            result => result,
        }
    }

    /// To the disk, then to the kernel.
    fn attempt(
        &mut self,
        changes: &[&Change],
        now: Duration,
        state: &mut Option<State>,
    ) -> Result<Batch, Failure> {
        let before = self.mirror.len();
        let batch = self.mirror.apply(changes, self.tools.family, ceiling(now));
        let mark = state.as_ref().map(State::mark);
        let written = match state {
            _ if self.mirror.len() > before.max(MAX_RULES) => Err(Failure::Full(MANY_RULES)),
            None => Ok(()),
            Some(state) => {
                let wanted = batch.wanted();
                let list = changes.iter().any(|c| c.is_list()).then_some(wanted.len());
                state.append(wanted.into_iter(), list).map_err(Failure::State)
            }
        };
        let committed = written.and_then(|()| match self.mirror.edits(&batch) {
            Some(edits) => self.run(&edits),
            None => self.repair(&batch, now.as_secs(), false),
        });
        match committed {
            Ok(()) => Ok(batch),
            Err(failure) => {
                self.mirror.undo(&batch);
                cut(state, mark);
                Err(failure)
            }
        }
    }

    fn run(&mut self, edits: &[Edit]) -> Result<(), Failure> {
        let result = self.tools.commit(edits);
        self.stale |= result.as_ref().is_err_and(Failure::is_passing);
        result
    }

    /// Reads the kernel and makes it hold what the mirror says.
    fn repair(&mut self, batch: &Batch, now: u64, starting: bool) -> Result<(), Failure> {
        let mut listing = Listing::new();
        self.tools.list(None, true, LIMIT, |chain, row| {
            listing.entry(chain).or_default().push(row);
            true
        })?;
        let law = Law { now, whitelist: &self.whitelist };
        let repair = self.mirror.repair(listing, batch, &law);
        self.run(&repair.edits)?;
        self.stale = false;
        self.report(&repair.notes, starting);
        Ok(())
    }

    fn report(&self, notes: &[(Note, Line)], starting: bool) {
        let count = |kind| notes.iter().filter(|(note, _)| *note == kind).count();
        let restored = count(Note::Restored);
        self.metrics.expired.add(count(Note::Expired));
        if restored > 0 && !starting {
            self.metrics.restored.add(restored);
            let how = "to remove a rule for good, DELETE it";
            self.log.warning(format_args!("rules put back that others removed: {restored}; {how}"));
        }
        for (note, line) in notes {
            match note {
                // At start these are the guard rules, which are new.
                Note::Restored if starting => {}
                Note::Restored => self.log.info(format_args!("restored {line}")),
                Note::Expired => self.log.info(format_args!("expired {line}")),
                Note::Removed(why) => self.log.warning(format_args!("removed {line}: {why}")),
            }
        }
    }

    /// Deletes what has expired.
    fn expire(&mut self, now: Duration) -> Result<(), Failure> {
        let due = self.mirror.due(now.as_secs());
        if due.is_empty() {
            return Ok(());
        }
        let delete = |rule: &Rule| Change { rules: Rules::One(*rule), action: Action::Delete };
        let changes: Vec<_> = due.iter().map(delete).collect();
        // The state file tells by itself what has expired.
        let results = self.commit(&changes.iter().collect::<Vec<_>>(), now, &mut None);
        for (result, rule) in results.iter().zip(&due) {
            if result.is_ok() {
                self.metrics.expired.add(1);
                self.log.info(format_args!("expired {rule}"));
            }
        }
        let mut failures = results.into_iter().filter_map(Result::err);
        let Some(failure) = failures.next() else { return Ok(()) };
        let left = failures.count().saturating_add(1);
        self.log.error(format_args!("rules that should have expired: {left}; {failure}"));
        Err(failure)
    }

    /// Looks whether the kernel holds what the mirror says, and mends it.
    fn look(&mut self, now: Duration) -> Result<(), Failure> {
        let mut comparison = self.mirror.compare();
        self.tools.list(None, false, LIMIT, |chain, row| comparison.row(chain, row))?;
        if comparison.is_same() {
            return Ok(());
        }
        self.repair(&Batch::default(), now.as_secs(), false)
    }
}

/// What the state file names, less what the whitelist has come to cover.
fn without_whitelisted(
    mut kept: Vec<Kept>,
    state: &mut Option<State>,
    whitelist: &Whitelist,
    log: &Log,
) -> Vec<Kept> {
    let listed = kept.extract_if(.., |(rule, _)| whitelist.conflict(rule).is_some());
    let listed: Vec<Rule> = listed.map(|(rule, _)| rule).collect();
    for rule in &listed {
        log.warning(format_args!("removed {rule}: whitelisted"));
    }
    forget(listed, state, log);
    kept
}

/// Takes rules out of the state file.
fn forget(rules: Vec<Rule>, state: &mut Option<State>, log: &Log) {
    let gone = rules.into_iter().map(|rule| (rule, None));
    if let Some(Err(sentence)) = state.as_mut().map(|state| state.append(gone, None)) {
        log.error(format_args!("{sentence}"));
    }
}

/// Takes back what the state file has of a change that came to nothing.
fn cut(state: &mut Option<State>, mark: Option<u64>) {
    if let (Some(state), Some(mark)) = (state, mark) {
        state.cut(mark);
    }
}

/// The rules for rfw's own port as they are listed: the whitelist may come in
/// and go out, nobody else.
fn guards(whitelist: &Whitelist, family: Family, port: u16) -> Vec<Owned> {
    let nets = whitelist.nets().iter().filter(|net| net.family() == family);
    let accepted = nets.map(|net| (Target::Accept, *net));
    let all = accepted.chain([(Target::Drop, Net::any(family))]);
    let kind = Kind::Guard(port);
    let guard = |target, scope| Owned::new(Line { rule: Rule { target, scope }, kind }, None);
    let inputs = all
        .clone()
        .map(|(target, source)| guard(target, Scope::Input { iface: Iface::ANY, source }));
    let outputs = all.map(|(target, destination)| {
        guard(target, Scope::Output { iface: Iface::ANY, destination })
    });
    inputs.chain(outputs).collect()
}

/// Sees whether the kernel takes rfw's rules, with one that no packet meets.
/// Cut short, it leaves a guard rule of no use, which the next start removes.
fn probe(tools: &Tools) -> Result<(), Failure> {
    let scope = Scope::Input { iface: Iface::ANY, source: Net::any(tools.family) };
    let rule = Rule { target: Target::Accept, scope };
    let probe = Owned::new(Line { rule, kind: Kind::Guard(0) }, None);
    tools.commit(&[Edit::Insert(1, probe)])?;
    tools.commit(&[Edit::Delete(probe)])
}

fn only_passing(failure: Failure) -> Result<(), Failure> {
    if failure.is_passing() { Err(failure) } else { Ok(()) }
}

fn refusal(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(words) => Refusal::Iptables(words),
        Failure::Passing(sentence) => Refusal::Busy(sentence),
        Failure::Full(sentence) => Refusal::Full(sentence),
        Failure::State(sentence) => Refusal::State(sentence),
    }
}

/// In whole seconds, rounded up: no rule lives shorter than it was told to.
fn ceiling(now: Duration) -> u64 {
    now.saturating_add(Duration::from_nanos(999_999_999)).as_secs()
}

/// A thread that panics takes the process with it, so no lock is ever poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
