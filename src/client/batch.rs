//! `rfwc batch`: a stream of requests, each of which is sent as soon as its line is read.
//!
//! ```text
//! line = ( "put" / "delete" ) path      ; in any letter case; blank lines and "#" comments are skipped
//! ```
//!
//! 1. Every server carries out every line, or the failure is reported.
//! 2. A line is sent at once, unless its rule overlaps that of a line in flight: then their order
//!    matters. All others are sent in parallel, each on its own connection, because rfw commits
//!    simultaneous requests together.
//! 3. The lines of a server that is down wait in a queue. Only a full queue delays the other servers,
//!    and for at most `--timeout`.

use super::exchange::{Failure, Request, send};
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

/// The number of connections to one server, each with its own thread: half of those that rfw serves
/// at a time. More of them are hardly faster (`make bench`).
const CONNECTIONS: usize = 64;
/// The number of all connections, though at least one for each server: a process may usually have
/// 1,024 descriptors.
const MAX_CONNECTIONS: usize = 768;
/// How many lines may wait for a server.
const MAX_WAITING: usize = 100_000;
/// The longest line in bytes: rfw accepts no longer request line.
const MAX_LINE: u64 = 8192;

/// One request and its line number.
struct Line {
    number: usize,
    job: Job,
    /// `None` if the path does not name a rule.
    rule: Option<Rule>,
}

impl Line {
    fn parse(number: usize, words: &[&str], query: &[String]) -> Option<Line> {
        let job = Job::parse(words, query).ok().filter(|job| job.method != "GET")?;
        let path = job.path.split('?').next()?;
        let rule = path.strip_suffix('/').unwrap_or(path).parse().ok();
        Some(Line { number, job, rule })
    }

    /// Whether the order of the two lines may matter.
    fn interferes(&self, other: &Line) -> bool {
        self.rule.zip(other.rule).is_none_or(|(rule, other)| rule.overlaps(&other))
    }
}

/// Sends each line of a source to all servers. Exit status: 0 all requests succeeded, 1 some
/// failed.
pub fn run(fleet: &Fleet, source: Box<dyn Read>, query: &[String]) -> ExitCode {
    let total = fleet.servers.len();
    let per_server = MAX_CONNECTIONS.checked_div(total).unwrap_or_default().clamp(1, CONNECTIONS);
    let report = Mutex::new(Report::default());
    let queues: Vec<_> = fleet.servers.iter().map(|server| (server, Queue::default())).collect();
    let result = thread::scope(|scope| {
        let mut threads = queues.iter().cycle().take(per_server.saturating_mul(total));
        let started = threads.try_for_each(|(server, queue)| {
            let work = || work(fleet, server, queue, &report);
            thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).map(drop)
        });
        let read = started.and_then(|()| read(BufReader::new(source), query, &queues));
        queues.iter().for_each(|(_, queue)| queue.end());
        read
    });
    if let Err(error) = &result {
        let _ = writeln!(io::stderr(), "# {error}; the remaining lines were not sent");
    }
    let status = lock(&report).finish();
    if result.is_ok_and(|all_valid| all_valid) { status } else { ExitCode::FAILURE }
}

/// Puts each line into all queues. Returns whether all lines were valid.
fn read(
    mut source: impl BufRead,
    query: &[String],
    queues: &[(&Server, Queue)],
) -> io::Result<bool> {
    let (mut bytes, mut number, mut all_valid) = (Vec::new(), 0_usize, true);
    while source.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes)? > 0 {
        let is_complete = bytes.ends_with(b"\n") || (bytes.len() as u64) < MAX_LINE;
        if !is_complete {
            source.skip_until(b'\n')?;
        }
        number = number.saturating_add(1);
        let text = String::from_utf8_lossy(&bytes);
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let line = Line::parse(number, &words, query).filter(|_| is_complete).map(Arc::new);
        if let Some(line) = line {
            queues.iter().for_each(|(_, queue)| queue.push(line.clone()));
        } else if words.first().is_some_and(|word| !word.starts_with('#')) {
            all_valid = false;
            let advice = "write put PATH or delete PATH, at most 8192 bytes";
            let _ = writeln!(io::stderr(), "# line {number}: {advice}");
        }
        bytes.clear();
    }
    Ok(all_valid)
}

/// Sends line after line, on one connection as long as it lasts.
fn work(fleet: &Fleet, server: &Server, queue: &Queue, report: &Mutex<Report>) {
    let (mut connection, mut done) = (None, None);
    while let Some(line) = queue.next(done) {
        let since = Instant::now();
        let request = Request { fleet, server, job: &line.job };
        let result = send(request, &mut connection, &mut |_| Ok(()));
        let mut waiting = VecDeque::new();
        match &result {
            Err(failure) if failure.retry_after.is_some() => waiting = queue.give_up(since),
            _ => queue.note_response(since),
        }
        if let Err(Failure { message, .. }) = result {
            for Line { number, job, .. } in iter::once(&line).chain(&waiting).map(AsRef::as_ref) {
                let message = format!("line {number}: {} {}: {message}", job.method, job.path);
                lock(report).record(server, &Err(message));
            }
        }
        done = Some(line);
    }
}

/// The lines of one server.
#[derive(Default)]
struct Queue {
    lines: Mutex<Lines>,
    /// There may be a line to take, or the lines have ended.
    ready: Condvar,
    /// The queue is no longer full.
    room: Condvar,
}

#[derive(Default)]
struct Lines {
    waiting: VecDeque<Arc<Line>>,
    in_flight: Vec<Arc<Line>>,
    /// The latest start of a request that got a response.
    last_response: Option<Instant>,
    has_ended: bool,
}

impl Lines {
    fn must_wait(&mut self) -> bool {
        match self.waiting.front() {
            Some(line) => self.in_flight.iter().any(|other| line.interferes(other)),
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

    /// Takes the next line, after `done` is no longer in flight; `None` at the end.
    fn next(&self, done: Option<Arc<Line>>) -> Option<Arc<Line>> {
        let mut lines = lock(&self.lines);
        lines.in_flight.retain(|line| done.as_ref().is_none_or(|done| !Arc::ptr_eq(line, done)));
        let lines = self.ready.wait_while(lines, Lines::must_wait);
        let mut lines = lines.unwrap_or_else(PoisonError::into_inner);
        // Another thread may have waited for `done`, too, and nothing else would wake it.
        if lines.waiting.len() > 1 || lines.has_ended {
            self.ready.notify_one();
        }
        let line = lines.waiting.pop_front()?;
        lines.in_flight.push(line.clone());
        self.room.notify_one();
        Some(line)
    }

    /// Notes that a request started then got a response: the server is alive.
    fn note_response(&self, started: Instant) {
        let mut lines = lock(&self.lines);
        lines.last_response = lines.last_response.max(Some(started));
    }

    /// Removes all waiting lines, unless a request started since then got a response.
    fn give_up(&self, since: Instant) -> VecDeque<Arc<Line>> {
        let mut lines = lock(&self.lines);
        if lines.last_response.is_some_and(|started| started >= since) {
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
        for invalid in ["get /list", "put", "put x", "put /x y", "/x", ""] {
            assert!(line(invalid).is_none(), "{invalid}");
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
        assert!(lock(&queue.lines).must_wait(), "the third has the rule of the first");
        let third = queue.next(Some(first)).unwrap();
        assert!(lock(&queue.lines).must_wait(), "the second is in flight, too");
        let since = Instant::now();
        queue.note_response(since);
        queue.note_response(since.checked_sub(std::time::Duration::from_millis(1)).unwrap());
        assert!(queue.give_up(since).is_empty(), "the server is alive");
        assert_eq!(queue.give_up(Instant::now()).len(), 1);
        queue.end();
        assert!(queue.next(Some(second)).is_none() && queue.next(Some(third)).is_none());
    }
}
