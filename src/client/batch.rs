//! `rfwc batch`: many requests to each server, as their lines come.
//!
//! ```text
//! line = ( "put" / "delete" ) path      ; in any letter case; blank, or after "#", there is none
//! ```
//!
//! 1. Every server answers every line, or the line is reported.
//! 2. A line is sent at once. Only one whose rule overlaps that of a line under way waits for it:
//!    their order matters. All others go together, each on a connection of its own, because rfw
//!    commits together what comes at the same time.
//! 3. The lines of a server that is down wait in a queue. It holds up the other servers only once
//!    that is full, and then for `--timeout` at most.

use super::exchange::{Failure, Request, ask};
use super::options::{Fleet, Job, Server};
use super::{Report, STACK};
use crate::mutex::lock;
use crate::rule::Rule;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;
use std::{iter, mem, thread};

/// Connections to one server, a thread each: half of those that rfw serves at a time. More make
/// it hardly faster (`make bench`).
const CONNECTIONS: usize = 64;
/// Connections in all, while each server has one: a process may usually have 1,024 descriptors.
const MAX_CONNECTIONS: usize = 768;
/// Lines that may wait for a server.
const MAX_WAITING: usize = 100_000;
/// The longest line in bytes: rfw takes no longer request line.
const MAX_LINE: u64 = 8192;

/// A request, and which line it is.
struct Line {
    number: usize,
    job: Job,
    /// `None` if the path names something else than a rule.
    rule: Option<Rule>,
}

impl Line {
    fn parse(number: usize, words: &[&str], query: &[String]) -> Option<Line> {
        let job = Job::parse(words, query).ok().filter(|job| job.method != "GET")?;
        let path = job.path.split('?').next()?;
        let rule = path.strip_suffix('/').unwrap_or(path).parse().ok();
        Some(Line { number, job, rule })
    }

    /// Whether their order may matter.
    fn interferes(&self, other: &Line) -> bool {
        self.rule.zip(other.rule).is_none_or(|(rule, other)| rule.overlaps(&other))
    }
}

/// Sends each line of a source to all servers. Exit status: 0 all servers did all of them, 1 some
/// did not.
pub fn run(fleet: &Fleet, source: Box<dyn Read>, query: &[String]) -> ExitCode {
    let total = fleet.servers.len();
    let each = MAX_CONNECTIONS.checked_div(total).unwrap_or_default().clamp(1, CONNECTIONS);
    let report = Mutex::new(Report::new(total, false));
    let queues: Vec<_> = fleet.servers.iter().map(|server| (server, Queue::default())).collect();
    let result = thread::scope(|scope| {
        let mut threads = queues.iter().cycle().take(each.saturating_mul(total));
        let started = threads.try_for_each(|(server, queue)| {
            let work = || work(fleet, server, queue, &report);
            thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).map(drop)
        });
        let read = started.and_then(|()| read(BufReader::new(source), query, &queues));
        queues.iter().for_each(|(_, queue)| queue.end());
        read
    });
    if let Err(error) = &result {
        let _ = writeln!(io::stderr(), "# {error}; the lines from there on were not sent");
    }
    let status = lock(&report).finish();
    if result.is_ok_and(|all_right| all_right) { status } else { ExitCode::FAILURE }
}

/// Puts each line into all queues. Returns whether all of them were right.
fn read(
    mut source: impl BufRead,
    query: &[String],
    queues: &[(&Server, Queue)],
) -> io::Result<bool> {
    let (mut bytes, mut number, mut all_right) = (Vec::new(), 0_usize, true);
    while source.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes)? > 0 {
        let is_whole = bytes.ends_with(b"\n") || (bytes.len() as u64) < MAX_LINE;
        if !is_whole {
            source.skip_until(b'\n')?;
        }
        number = number.saturating_add(1);
        let text = String::from_utf8_lossy(&bytes);
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let line = Line::parse(number, &words, query).filter(|_| is_whole).map(Arc::new);
        if let Some(line) = line {
            queues.iter().for_each(|(_, queue)| queue.push(line.clone()));
        } else if words.first().is_some_and(|word| !word.starts_with('#')) {
            all_right = false;
            let wrong = "write put PATH or delete PATH, with 8192 bytes at most";
            let _ = writeln!(io::stderr(), "# line {number}: {wrong}");
        }
        bytes.clear();
    }
    Ok(all_right)
}

/// Sends line after line, on one connection as long as it lasts.
fn work(fleet: &Fleet, server: &Server, queue: &Queue, report: &Mutex<Report>) {
    let (mut connection, mut done) = (None, None);
    while let Some(line) = queue.next(done) {
        let since = Instant::now();
        let request = Request { fleet, server, job: &line.job };
        let result = ask(request, &mut connection, &mut |_| Ok(()));
        let mut waiting = VecDeque::new();
        match &result {
            Err(failure) if failure.again.is_some() => waiting = queue.give_up(since),
            _ => queue.answered(since),
        }
        if let Err(Failure { words, .. }) = result {
            for Line { number, job, .. } in iter::once(&line).chain(&waiting).map(AsRef::as_ref) {
                let words = format!("line {number}: {} {}: {words}", job.method, job.path);
                lock(report).end(server, &Err(words), false);
            }
        }
        done = Some(line);
    }
}

/// The lines of one server.
#[derive(Default)]
struct Queue {
    lines: Mutex<Lines>,
    /// There is a line to take, or the end.
    ready: Condvar,
    room: Condvar,
}

#[derive(Default)]
struct Lines {
    waiting: VecDeque<Arc<Line>>,
    under_way: Vec<Arc<Line>>,
    /// When the latest of the requests that were answered had been begun.
    answered: Option<Instant>,
    has_ended: bool,
}

impl Lines {
    fn must_wait(&mut self) -> bool {
        match self.waiting.front() {
            Some(line) => self.under_way.iter().any(|other| line.interferes(other)),
            None => !self.has_ended,
        }
    }
}

impl Queue {
    fn push(&self, line: Arc<Line>) {
        let is_full = |lines: &mut Lines| lines.waiting.len() >= MAX_WAITING;
        let lines = self.room.wait_while(lock(&self.lines), is_full);
        lines.unwrap_or_else(PoisonError::into_inner).waiting.push_back(line);
        self.ready.notify_one();
    }

    fn end(&self) {
        lock(&self.lines).has_ended = true;
        self.ready.notify_all();
    }

    /// Takes the next line, `done` being no longer under way; `None` at the end.
    fn next(&self, done: Option<Arc<Line>>) -> Option<Arc<Line>> {
        let mut lines = lock(&self.lines);
        lines.under_way.retain(|line| done.as_ref().is_none_or(|done| !Arc::ptr_eq(line, done)));
        let lines = self.ready.wait_while(lines, Lines::must_wait);
        let mut lines = lines.unwrap_or_else(PoisonError::into_inner);
        // The next one may have waited for `done`, too, and nobody else would wake it.
        if lines.waiting.len() > 1 || lines.has_ended {
            self.ready.notify_one();
        }
        let line = lines.waiting.pop_front()?;
        lines.under_way.push(line.clone());
        self.room.notify_one();
        Some(line)
    }

    /// A request begun then was answered, so the server lives.
    fn answered(&self, since: Instant) {
        let mut lines = lock(&self.lines);
        lines.answered = lines.answered.max(Some(since));
    }

    /// Takes all that wait, unless the server has answered a request begun since then.
    fn give_up(&self, since: Instant) -> VecDeque<Arc<Line>> {
        let mut lines = lock(&self.lines);
        if lines.answered.is_some_and(|answered| answered >= since) {
            return VecDeque::new();
        }
        self.room.notify_one();
        mem::take(&mut lines.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Option<Arc<Line>> {
        let words: Vec<&str> = text.split(' ').collect();
        Line::parse(1, &words, &[]).map(Arc::new)
    }

    #[test]
    fn lines_whose_order_matters() {
        let table = [
            ("put /drop/input/any/1.2.3.4", "put /drop/input/any/1.2.3.5", false),
            ("put /drop/input/any/1.2.3.4", "delete /drop/input/any/1.2.3.4/", true),
            ("put /drop/input/any/1.2.3.4?expire=1", "PUT /Accept/Input/eth0/1.2.3.0/24", true),
            ("put /drop/input/any/1.2.3.4", "put /drop/output/any/1.2.3.4", false),
            ("put /drop/forward/any/1.2.3.4", "put /drop/forward/any/::/any/2001:db8::1", false),
            ("put /drop/forward/any/1.2.3.4", "put /drop/forward/any/0.0.0.0/any/9.9.9.9", true),
            ("put /drop/input/any/1.2.3.4", "delete /list?tag=feed", true),
            ("put /drop/input/any/1.2.3.4", "put /%64rop/input/any/1.2.3.5", true),
        ];
        for (a, b, expected) in table {
            let (a, b) = (line(a).unwrap(), line(b).unwrap());
            assert_eq!((a.interferes(&b), b.interferes(&a)), (expected, expected));
        }
        for wrong in ["get /list", "put", "put x", "put /x y", "/x", ""] {
            assert!(line(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn what_a_queue_hands_out() {
        let queue = Queue::default();
        let texts = ["put /drop/input/any/1.1.1.1", "put /drop/input/any/2.2.2.2"];
        for text in [texts[0], texts[1], texts[0], texts[1]] {
            queue.push(line(text).unwrap());
        }
        let (first, second) = (queue.next(None).unwrap(), queue.next(None).unwrap());
        assert!(lock(&queue.lines).must_wait(), "the third is about the rule of the first");
        let third = queue.next(Some(first)).unwrap();
        assert!(lock(&queue.lines).must_wait(), "the second is under way, too");
        let since = Instant::now();
        queue.answered(since);
        queue.answered(since.checked_sub(std::time::Duration::from_millis(1)).unwrap());
        assert!(queue.give_up(since).is_empty(), "the server is alive");
        assert_eq!(queue.give_up(Instant::now()).len(), 1);
        queue.end();
        assert!(queue.next(Some(second)).is_none() && queue.next(Some(third)).is_none());
    }
}
