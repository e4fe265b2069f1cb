//! The command function: one Mutex, one batch at a time, one answer for each
//! request.
//!
//! A thread that wants a change queues it and waits for the Mutex. Whoever
//! gets it commits everything that is queued by then as one batch, for the
//! others too; they find their answers when their turn comes.

pub mod exec;
pub mod expiry;
pub mod kernel;
pub mod mirror;

use crate::clock::{self, Clock};
use crate::http::auth::Client;
use crate::http::response::Refusal;
use crate::log::Log;
use crate::rule::net::{Family, Net};
use crate::rule::whitelist::{Permitted, Whitelist};
use crate::rule::{Action, Chain, Change, Iface, Rule, Scope, Target};
use exec::Failure;
use kernel::{Listed, Owned, Row, Tag, Tools};
use mirror::{Batch, Law, Listing, Mirror, Reason, Repair};
use std::collections::{BTreeSet, HashMap};
use std::mem;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two looks at the kernel, and how many times as long
/// as a look takes the pause behind it is: one look in twenty-one parts is
/// under 5 % of one processor.
const PAUSE: Duration = Duration::from_millis(900);
const PAUSE_FACTOR: u32 = 20;

/// What became of a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The rule is new.
    Inserted,
    /// The rule was there; it has a new expiry and stands in front.
    Refreshed,
    /// The rule was there, just so.
    Exists,
    /// The rule is gone.
    Deleted,
    /// There was no such rule.
    Absent,
}

impl Verdict {
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

/// The answer to a change that the kernel has taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// What became of it.
    pub verdict: Verdict,
    /// The rule, in canonical form.
    pub rule: Rule,
    /// When it expires, in Unix seconds.
    pub expires: Option<u64>,
}

/// A change that waits, and where its answer goes.
struct Job {
    change: Change,
    answer: Sender<Result<Outcome, Failure>>,
}

/// The kernel's tables as far as they are rfw's.
pub struct Firewall {
    queue: Mutex<Vec<Job>>,
    kernel: Mutex<Kernel>,
    tools: HashMap<Family, Tools>,
}

/// What the Mutex guards.
struct Kernel {
    mirror: Mirror,
    clock: Clock,
    whitelist: Arc<Whitelist>,
    log: Arc<Log>,
    /// Families of which nobody knows what the kernel holds, since a program
    /// was ended in the middle.
    stale: BTreeSet<Family>,
    next_look: Instant,
}

impl Firewall {
    /// Reads what the kernel holds of rfw's, and puts the guard rules of the
    /// outward server's port there. The error is a sentence.
    pub fn start(
        programs: [Tools; 2],
        guarded: Option<u16>,
        whitelist: Arc<Whitelist>,
        log: Arc<Log>,
    ) -> Result<Firewall, String> {
        let mut kernel = Kernel {
            mirror: Mirror::default(),
            clock: Clock::start(),
            whitelist,
            log,
            stale: BTreeSet::new(),
            next_look: Instant::now(),
        };
        let mut tools = HashMap::new();
        for program in programs {
            if kernel.begin(&program, guarded)? {
                tools.insert(program.family(), program);
            }
        }
        Ok(Firewall { queue: Mutex::default(), kernel: Mutex::new(kernel), tools })
    }

    /// Carries out a change. When it returns, the kernel has taken it, or
    /// nothing of it.
    pub fn apply(&self, _client: &Client, change: Permitted) -> Result<Outcome, Refusal> {
        let change = change.into_change();
        if !self.tools.contains_key(&change.rule.family()) {
            return Err(Refusal::NoIpv6);
        }
        let (sender, answer) = mpsc::channel();
        lock(&self.queue).push(Job { change, answer: sender });
        let mut kernel = lock(&self.kernel);
        let answered = answer.try_recv().or_else(|_| {
            self.lead(&mut kernel);
            answer.try_recv()
        });
        match answered {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(Failure::Refused(words))) => Err(Refusal::Iptables(words)),
            Ok(Err(failure)) => Err(Refusal::Busy(failure.to_string())),
            Err(_) => Err(Refusal::Busy("The change was not carried out.".into())),
        }
    }

    /// Commits everything that waits.
    fn lead(&self, kernel: &mut Kernel) {
        let jobs = mem::take(&mut *lock(&self.queue));
        for (family, tools) in &self.tools {
            let jobs = jobs.iter().filter(|job| job.change.rule.family() == *family);
            let (changes, answers): (Vec<_>, Vec<_>) =
                jobs.map(|job| (job.change, &job.answer)).unzip();
            let results = kernel.commit(tools, &changes);
            self.give_up_waiting(results.iter().find_map(|result| result.as_ref().err()));
            for (answer, result) in answers.into_iter().zip(results) {
                let _ = answer.send(result);
            }
        }
    }

    /// Where a program hung, those who queued meanwhile get the same answer:
    /// nobody waits for the time limit twice.
    fn give_up_waiting(&self, failure: Option<&Failure>) {
        if let Some(failure) = failure.filter(|failure| failure.is_passing()) {
            for job in mem::take(&mut *lock(&self.queue)) {
                let _ = job.answer.send(Err(failure.clone()));
            }
        }
    }

    /// Hands every rule of rfw's but the guard rules to `each`, read from the
    /// kernel, until it says `false`.
    pub fn list(
        &self,
        _client: &Client,
        chain: Option<Chain>,
        mut each: impl FnMut(&Listed) -> bool,
    ) -> Result<(), Refusal> {
        let mut wanted = true;
        for tools in Family::ALL.iter().filter_map(|family| self.tools.get(family)) {
            let mut nums = HashMap::new();
            let row = |chain, row| {
                let num: &mut usize = nums.entry(chain).or_default();
                *num = num.saturating_add(1);
                if let Some(listed) = listed(row, *num) {
                    wanted = each(&listed);
                }
                wanted
            };
            tools.list(chain, row).map_err(|failure| match failure {
                Failure::Refused(words) => Refusal::Iptables(words),
                failure => Refusal::Busy(failure.to_string()),
            })?;
            if !wanted {
                break;
            }
        }
        Ok(())
    }

    /// What is to be done every second: follow the wall clock, delete what has
    /// expired, look whether the kernel still holds what it should.
    pub fn tick(&self) {
        let mut kernel = lock(&self.kernel);
        kernel.follow_clock();
        for family in Family::ALL {
            if let Some(tools) = self.tools.get(&family) {
                let expired = kernel.expire(tools);
                self.give_up_waiting(expired.err().as_ref());
            }
        }
        if Instant::now() < kernel.next_look {
            return;
        }
        let started = Instant::now();
        for tools in self.tools.values() {
            let looked = kernel.look(tools);
            self.give_up_waiting(looked.err().as_ref());
        }
        let pause = started.elapsed().saturating_mul(PAUSE_FACTOR).max(PAUSE);
        kernel.next_look = Instant::now().checked_add(pause).unwrap_or(started);
    }
}

fn listed(row: Row, num: usize) -> Option<Listed> {
    match row {
        Row::Own(Owned { tag: Tag::Guard(_), .. }) | Row::Foreign => None,
        Row::Own(Owned { rule, tag, counters: (packets, bytes) }) => {
            Some(Listed { rule, num, packets, bytes, expires: tag.expires() })
        }
    }
}

impl Kernel {
    /// Starts one family; `false` if this host has no IPv6 to filter.
    fn begin(&mut self, tools: &Tools, guarded: Option<u16>) -> Result<bool, String> {
        let family = tools.family();
        let listing = match listing(tools) {
            Ok(listing) => listing,
            Err(failure @ (Failure::Refused(_) | Failure::Start(_))) if family == Family::V6 => {
                self.log.warning(format_args!("IPv6 rules are not taken: {failure}"));
                return Ok(false);
            }
            Err(failure) => {
                return Err(format!(
                    "cannot read the kernel's rules: {failure} \
                     Run rfw as root or with CAP_NET_ADMIN, and check iptables.path."
                ));
            }
        };
        let guards = guarded.map_or(Vec::new(), |port| guards(&self.whitelist, family, port));
        let fresh = !listing.values().flatten().any(|row| row.rule().is_some());
        if fresh && guards.is_empty() {
            probe(tools)?;
        }
        for guard in guards.iter().rev() {
            self.mirror.add(guard.rule, guard.tag);
        }
        self.repair_listed(tools, listing, &Batch::default()).map_err(|f| no_rules(&f))?;
        Ok(true)
    }

    /// Commits changes of one family, and answers each.
    fn commit(&mut self, tools: &Tools, changes: &[Change]) -> Vec<Result<Outcome, Failure>> {
        match self.commit_all(tools, changes) {
            Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
            Err(failure) if failure.is_passing() || changes.len() == 1 => {
                changes.iter().map(|_| Err(failure.clone())).collect()
            }
            Err(_) => self.commit_each(tools, changes),
        }
    }

    /// One by one, so that only the rules that the kernel refuses fail.
    fn commit_each(&mut self, tools: &Tools, changes: &[Change]) -> Vec<Result<Outcome, Failure>> {
        let mut passing = None;
        let mut one = |change: &Change| {
            if let Some(failure) = &passing {
                return Err(Failure::clone(failure));
            }
            let result = self.commit_all(tools, std::slice::from_ref(change));
            passing = result.as_ref().err().filter(|failure| failure.is_passing()).cloned();
            result.and_then(|outcomes| {
                outcomes.into_iter().next().ok_or(Failure::Refused("No answer.".into()))
            })
        };
        changes.iter().map(&mut one).collect()
    }

    /// All or nothing. What fails is tried again on a mirror made true, because
    /// somebody else may have removed a rule that was to be deleted.
    fn commit_all(&mut self, tools: &Tools, changes: &[Change]) -> Result<Vec<Outcome>, Failure> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        if self.stale.contains(&tools.family()) {
            self.repair(tools, &Batch::default())?;
        }
        match self.attempt(tools, changes) {
            Err(Failure::Refused(_)) => {
                self.repair(tools, &Batch::default())?;
                self.attempt(tools, changes)
            }
            result => result,
        }
    }

    fn attempt(&mut self, tools: &Tools, changes: &[Change]) -> Result<Vec<Outcome>, Failure> {
        // Rounded up: no rule lives shorter than it was told to.
        let now = self.clock.now().saturating_add(Duration::from_nanos(999_999_999)).as_secs();
        let batch = self.mirror.apply(changes, now);
        let committed = match self.mirror.lines(&batch) {
            Some(lines) => self.run(tools, &lines),
            None => self.repair(tools, &batch),
        };
        match committed {
            Ok(()) => Ok(batch.outcomes),
            Err(failure) => {
                self.mirror.undo(batch);
                Err(failure)
            }
        }
    }

    fn run(&mut self, tools: &Tools, lines: &[String]) -> Result<(), Failure> {
        let result = tools.commit(lines);
        if result.as_ref().is_err_and(Failure::is_passing) {
            self.stale.insert(tools.family());
        }
        result
    }

    /// Reads the kernel and makes it hold what the mirror says.
    fn repair(&mut self, tools: &Tools, batch: &Batch) -> Result<(), Failure> {
        let listing = listing(tools)?;
        self.repair_listed(tools, listing, batch)
    }

    fn repair_listed(
        &mut self,
        tools: &Tools,
        listing: Listing,
        batch: &Batch,
    ) -> Result<(), Failure> {
        let law = Law { now: self.clock.now().as_secs(), whitelist: &self.whitelist };
        let repair = self.mirror.repair(tools.family(), listing, batch, &law);
        self.run(tools, &repair.lines)?;
        self.mirror.learn(&repair);
        self.stale.remove(&tools.family());
        self.report(&repair);
        Ok(())
    }

    fn report(&self, repair: &Repair) {
        if repair.adopted > 0 {
            self.log.info(format_args!("found {} rules of rfw's in the kernel", repair.adopted));
        }
        if !repair.restored.is_empty() {
            self.log.warning(format_args!(
                "{} rules of rfw's that another program had removed are put back; \
                 to remove a rule for good, DELETE it",
                repair.restored.len()
            ));
        }
        for rule in &repair.restored {
            self.log.info(format_args!("restored {rule}"));
        }
        for (rule, reason) in &repair.removed {
            match reason {
                Reason::Expired => self.log.info(format_args!("expired {rule}")),
                Reason::OldGuard => {
                    self.log.info(format_args!("removed {rule}: an old guard rule"))
                }
                Reason::Whitelisted => {
                    self.log.warning(format_args!("removed {rule}: it overlaps the whitelist"));
                }
                Reason::Double => self.log.warning(format_args!("removed {rule}: it stood twice")),
            }
        }
    }

    /// Deletes what has expired.
    fn expire(&mut self, tools: &Tools) -> Result<(), Failure> {
        let due = self.mirror.due(self.clock.now().as_secs());
        let due = due.into_iter().filter(|rule| rule.family() == tools.family());
        let changes: Vec<_> = due.map(|rule| Change { rule, action: Action::Delete }).collect();
        let mut end = Ok(());
        for (result, change) in self.commit(tools, &changes).into_iter().zip(&changes) {
            match result {
                Ok(_) => self.log.info(format_args!("expired {}", change.rule)),
                Err(failure) => {
                    self.log.error(format_args!("not yet expired {}: {failure}", change.rule));
                    end = Err(failure);
                }
            }
        }
        end
    }

    /// Looks whether the kernel holds what the mirror says, and mends it.
    fn look(&mut self, tools: &Tools) -> Result<(), Failure> {
        let mut comparison = self.mirror.compare(tools.family());
        let listed = tools.list(None, |chain, row| comparison.row(chain, &row));
        let same = comparison.is_same();
        let mended = match listed {
            Ok(()) if same => Ok(()),
            Ok(()) => self.repair(tools, &Batch::default()),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = &mended {
            self.log.error(format_args!("cannot check the kernel's rules: {failure}"));
        }
        mended
    }

    /// Where the wall clock was set, moves the expiries with it: the kernel's
    /// comments are found different at the next look, and stamped anew.
    fn follow_clock(&mut self) {
        if let Some(seconds) = self.clock.follow(clock::wall()) {
            self.log.warning(format_args!(
                "the clock was set by {seconds} s; the expiries are stamped anew"
            ));
            self.mirror.shift(seconds);
            self.next_look = Instant::now();
        }
    }
}

fn listing(tools: &Tools) -> Result<Listing, Failure> {
    let mut listing = Listing::new();
    tools.list(None, |chain, row| {
        listing.entry(chain).or_default().push(row);
        true
    })?;
    Ok(listing)
}

/// The rules for rfw's own port, front first: the whitelist may come in and go
/// out, nobody else.
fn guards(whitelist: &Whitelist, family: Family, port: u16) -> Vec<Owned> {
    let nets = whitelist.nets().iter().filter(|net| net.family() == family);
    let accepted = nets.map(|net| (Target::Accept, *net));
    let all = accepted.chain([(Target::Drop, Net::any(family))]);
    let both = all.flat_map(|(target, net)| {
        let input = Scope::Input { iface: Iface::Any, source: net };
        let output = Scope::Output { iface: Iface::Any, destination: net };
        [input, output].map(|scope| Rule { target, scope })
    });
    let tag = Tag::Guard(port);
    both.map(|rule| Owned { rule, tag, counters: (0, 0) }).collect()
}

/// Sees whether the kernel takes rfw's rules, with one that no packet meets.
/// Where this is cut short, the next start finds it as a guard rule of no use.
fn probe(tools: &Tools) -> Result<(), String> {
    let scope = Scope::Input { iface: Iface::Any, source: Net::any(tools.family()) };
    let rule = Rule { target: Target::Accept, scope };
    let probe = Owned { rule, tag: Tag::Guard(0), counters: (0, 0) };
    [probe.insert_line(1), probe.delete_line()]
        .into_iter()
        .try_for_each(|line| tools.commit(&[line]))
        .map_err(|failure| no_rules(&failure))
}

fn no_rules(failure: &Failure) -> String {
    format!(
        "the kernel did not take rfw's rules: {failure} \
         It must have the comment match (xt_comment), and rfw must be root or have CAP_NET_ADMIN."
    )
}

/// A thread that panics takes the process with it, so no lock is ever poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
