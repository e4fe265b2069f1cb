//! Requests that wait are committed together, by one of their threads.
//!
//! A thread that submits a job while none is being committed becomes the leader: it takes the
//! Mutex of the worker, commits all waiting jobs as one batch, distributes the results, and passes
//! the lead to the next waiting thread. A long job is a batch of its own.
//! If fewer jobs wait than the last batch had, the leader waits a moment for the rest.
//! Short jobs overtake long ones, but after each batch of short jobs one long job has its turn.

use crate::mutex::lock;
use std::collections::VecDeque;
use std::mem;
use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

/// How long a batch waits for more jobs: 1 to 2 ms, as long as a program needs.
const GATHER_STEPS: usize = 20;
const GATHER_STEP: Duration = Duration::from_micros(50);

/// What a waiting thread gets.
enum Turn<R> {
    Lead,
    Result(R),
}

struct Job<J, R> {
    job: J,
    is_long: bool,
    waiter: Sender<Turn<R>>,
}

struct Waiting<J, R> {
    jobs: VecDeque<Job<J, R>>,
    /// Whether a thread leads; it will pass on the lead.
    is_led: bool,
    /// Whether the last batch was of short jobs.
    was_short: bool,
    /// How many jobs it had.
    last: usize,
}

/// A worker, which one thread at a time may use, and the jobs that wait for it.
pub struct Queue<W, J, R> {
    worker: Mutex<W>,
    waiting: Mutex<Waiting<J, R>>,
}

impl<W, J, R: Clone> Queue<W, J, R> {
    pub fn new(worker: W) -> Queue<W, J, R> {
        let waiting = Waiting { jobs: VecDeque::new(), is_led: false, was_short: false, last: 0 };
        Queue { worker: Mutex::new(worker), waiting: Mutex::new(waiting) }
    }

    /// Commits a job, in this thread or another one, and returns its result; `None` if `commit`
    /// returned none for it. `commit` returns the result of each job and, if a program hung, an
    /// outage, as in [`Queue::with`].
    pub fn submit(
        &self,
        job: J,
        is_long: bool,
        commit: impl Fn(&mut W, Vec<J>) -> (Vec<R>, Option<R>),
    ) -> Option<R> {
        let (waiter, turns) = mpsc::channel();
        let mut waiting = lock(&self.waiting);
        waiting.jobs.push_back(Job { job, is_long, waiter });
        let leads = !mem::replace(&mut waiting.is_led, true);
        drop(waiting);
        if leads {
            self.lead(&commit);
        }
        loop {
            match turns.recv().ok()? {
                Turn::Lead => self.lead(&commit),
                Turn::Result(result) => return Some(result),
            }
        }
    }

    /// Uses the worker. An outage, which `work` also returns if a program hung, is the result of all
    /// jobs that were submitted meanwhile: no client waits for a time limit twice.
    pub fn with<T>(&self, work: impl FnOnce(&mut W) -> (T, Option<R>)) -> T {
        let mut worker = lock(&self.worker);
        let (result, outage) = work(&mut worker);
        if let Some(outage) = outage {
            for job in mem::take(&mut lock(&self.waiting).jobs) {
                let _ = job.waiter.send(Turn::Result(outage.clone()));
            }
        }
        result
    }

    fn lead(&self, commit: &impl Fn(&mut W, Vec<J>) -> (Vec<R>, Option<R>)) {
        self.gather();
        self.with(|worker| {
            let (jobs, waiters) = self.take();
            let (results, outage) = commit(worker, jobs);
            for (waiter, result) in waiters.iter().zip(results) {
                let _ = waiter.send(Turn::Result(result));
            }
            ((), outage)
        });
        let mut waiting = lock(&self.waiting);
        let next = waiting.jobs.front();
        waiting.is_led = next.is_some_and(|next| next.waiter.send(Turn::Lead).is_ok());
    }

    /// Waits a moment until as many jobs wait as the last batch had: clients that were answered
    /// together send their next requests together.
    fn gather(&self) {
        for _ in 0..GATHER_STEPS {
            let waiting = lock(&self.waiting);
            if waiting.jobs.len() >= waiting.last {
                return;
            }
            drop(waiting);
            thread::sleep(GATHER_STEP);
        }
    }

    /// All short jobs, or one long one.
    fn take(&self) -> (Vec<J>, Vec<Sender<Turn<R>>>) {
        let mut waiting = lock(&self.waiting);
        let short = waiting.jobs.iter().filter(|job| !job.is_long).count();
        let all = waiting.jobs.len();
        waiting.was_short = short > 0 && (short == all || !waiting.was_short);
        let mut taken = VecDeque::new();
        if waiting.was_short {
            let jobs = mem::take(&mut waiting.jobs);
            (waiting.jobs, taken) = jobs.into_iter().partition(|job| job.is_long);
        } else if let Some(long) = waiting.jobs.iter().position(|job| job.is_long) {
            taken.extend(waiting.jobs.remove(long));
        }
        waiting.last = taken.len();
        taken.into_iter().map(|job| (job.job, job.waiter)).unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::{self, Scope};

    /// The worker is the list of the batches that were committed.
    struct Test {
        queue: Queue<Vec<String>, &'static str, String>,
        /// What is submitted while each batch is being committed, in order.
        steps: Mutex<VecDeque<&'static str>>,
        /// As far as they are not "done".
        results: Mutex<Vec<String>>,
    }

    impl Test {
        fn new(steps: &[&'static str]) -> Test {
            let steps = Mutex::new(steps.iter().copied().collect());
            Test { queue: Queue::new(Vec::new()), steps, results: Mutex::default() }
        }

        fn count(&self) -> usize {
            lock(&self.queue.waiting).jobs.len()
        }

        /// Submits jobs, one after the other, to a worker that is in use.
        fn submit<'s>(&'s self, scope: &'s Scope<'s, '_>, jobs: &'static str) {
            for job in jobs.split_whitespace() {
                let before = self.count();
                scope.spawn(move || self.commit(scope, job));
                while self.count() == before {
                    thread::yield_now();
                }
            }
        }

        /// A job whose name starts with L is long; one with X hangs, which is an outage; one with N
        /// and those after it get no result.
        fn commit<'s>(&'s self, scope: &'s Scope<'s, '_>, job: &'static str) {
            let result = self.queue.submit(job, job.starts_with('L'), |batches, jobs| {
                batches.push(jobs.join(" "));
                let step = lock(&self.steps).pop_front();
                self.submit(scope, step.unwrap_or_default());
                let with_result = jobs.iter().take_while(|job| !job.starts_with('N'));
                let results = with_result.map(|job| format!("{job} done")).collect();
                let is_hung = jobs.iter().any(|job| job.starts_with('X'));
                (results, is_hung.then(|| "outage".to_string()))
            });
            if result != Some(format!("{job} done")) {
                let result = result.unwrap_or("none".into());
                lock(&self.results).push(format!("{job}: {result}"));
            }
        }

        fn end(self) -> (String, String) {
            let mut results = lock(&self.results);
            results.sort();
            (lock(&self.queue.worker).join(", "), results.join(", "))
        }
    }

    #[test]
    fn batches() {
        // The first job, what is submitted while each batch is committed, the batches and the
        // results
        let table: &[(&str, &[&str], &str, &str)] = &[
            ("a", &[], "a", ""),
            ("L", &[], "L", ""),
            ("a", &["b c d", "e"], "a, b c d, e", ""),
            // A long job is a batch of its own; after each batch of short jobs, one has its turn.
            ("a", &["L1 b"], "a, L1, b", ""),
            ("L0", &["L1 b c"], "L0, b c, L1", ""),
            ("L0", &["L1 L2 b"], "L0, b, L1, L2", ""),
            ("a", &["L1 L2 b", "c", "d", "e"], "a, L1, b c, L2, d e", ""),
            ("L0", &["b", "c", "L1 d", "L2", "e"], "L0, b, c, L1, d, L2, e", ""),
            // Jobs that waited during an outage get it as their result, later ones do not.
            ("X", &["a L1 b"], "X", "L1: outage, a: outage, b: outage"),
            ("a", &["X b L1", "c", "d"], "a, L1, X b c", "d: outage"),
            ("a", &["N b", "c"], "a, N b, c", "N: none, b: none"),
            ("a", &["b N", "L1"], "a, b N, L1", "N: none"),
        ];
        for (first, steps, batches, results) in table {
            let test = Test::new(steps);
            thread::scope(|scope| test.commit(scope, first));
            assert_eq!(test.end(), (batches.to_string(), results.to_string()), "{first} {steps:?}");
        }
    }

    #[test]
    fn an_outage_has_no_effect_on_later_jobs() {
        let test = Test::new(&["a b", "c"]);
        thread::scope(|scope| test.commit(scope, "X"));
        thread::scope(|scope| test.commit(scope, "d"));
        assert_eq!(test.end(), ("X, d, c".into(), "a: outage, b: outage".into()));
    }

    #[test]
    fn with_the_worker() {
        let test = Test::new(&[]);
        thread::scope(|scope| {
            let number = test.queue.with(|batches| {
                test.submit(scope, "a b");
                assert!(batches.is_empty(), "the worker is in use");
                (7, None)
            });
            assert_eq!(number, 7);
        });
        thread::scope(|scope| {
            test.queue.with(|_| {
                test.submit(scope, "c L");
                ((), Some("outage".into()))
            });
        });
        let (batches, results) = test.end();
        // The thread that was to lead finds nothing to commit.
        assert_eq!(batches, "a b, ");
        assert_eq!(results, "L: outage, c: outage");
    }
}
