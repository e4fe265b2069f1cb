//! The only writer of the log.
//!
//! Nothing waits for the log: each file has a bounded queue and a thread that writes it. When the
//! queue is full, lines are lost and counted. Refusals are limited, so that no client fills a disk.

use crate::clock::{self, Utc};
use crate::mutex::lock;
use crate::rule::net::Net;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::mem;
use std::net::IpAddr;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Lines queued for one file, mostly of 100 bytes: more than one check of the kernel logs.
const MAX_QUEUED: usize = 4096;
/// The longest line in bytes, which a pipe accepts whole or not at all (PIPE_BUF).
const MAX_LINE: usize = 4096;
/// The delay after a failed write.
const RETRY_TIME: Duration = Duration::from_secs(1);
/// How long unwritten lines may delay the program's exit.
const FLUSH_TIME: Duration = Duration::from_secs(1);
/// Refusals of one address that are logged per [`WINDOW`]: more than a person reads.
const MAX_REFUSALS: usize = 100;
/// The same for failed TLS handshakes, most of which have the same reason.
const MAX_HANDSHAKES: usize = 10;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses that are counted individually; all others share one count.
const MAX_PEERS: usize = 1024;

/// The severity of an event, in ascending order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    Debug,
    Info,
    Warning,
    Error,
    Critical,
}

impl Level {
    const ALL: [(Level, &str); 5] = [
        (Level::Debug, "DEBUG"),
        (Level::Info, "INFO"),
        (Level::Warning, "WARNING"),
        (Level::Error, "ERROR"),
        (Level::Critical, "CRITICAL"),
    ];

    pub fn name(self) -> &'static str {
        Level::ALL.iter().find(|(level, _)| *level == self).map_or("", |(_, name)| name)
    }

    /// Parses a name in any letter case.
    pub fn parse(text: &str) -> Option<Level> {
        Level::ALL.iter().find(|(_, name)| name.eq_ignore_ascii_case(text)).map(|(level, _)| *level)
    }
}

/// The files of the log. Dropping it waits for all lines to be written, [`FLUSH_TIME`] per file.
#[derive(Default)]
pub struct Log {
    sinks: Vec<Sink>,
    refusals: Mutex<Limiter<MAX_REFUSALS>>,
    handshakes: Mutex<Limiter<MAX_HANDSHAKES>>,
}

impl Log {
    /// Adds a file for events of this level and above. Fails if its thread cannot be started.
    pub fn add(&mut self, file: File, level: Level) -> io::Result<()> {
        let (lines, queue) = mpsc::sync_channel(MAX_QUEUED);
        let (end, written) = mpsc::sync_channel(0);
        let lost = Arc::default();
        let sink = Sink { level, lines, lost: Arc::clone(&lost), written: Mutex::new(written) };
        thread::Builder::new().spawn(move || {
            let _end: SyncSender<()> = end;
            while let Some(line) = next(&queue, &lost) {
                write_line(&file, line.as_bytes());
            }
        })?;
        self.sinks.push(sink);
        Ok(())
    }

    /// Logs one event without waiting. Text from a client must have passed through [`printable`].
    pub fn write(&self, level: Level, event: fmt::Arguments<'_>) {
        if self.is_enabled(level) {
            let line = line(level, event);
            self.sinks.iter().filter(|sink| level >= sink.level).for_each(|sink| sink.push(&line));
        }
    }

    /// Logs a refused request, at most [`MAX_REFUSALS`] per address and [`WINDOW`].
    pub fn refusal(&self, peer: IpAddr, level: Level, event: fmt::Arguments<'_>) {
        if self.is_enabled(level) && lock(&self.refusals).admits(Net::source(peer), Instant::now())
        {
            self.write(level, event);
        }
    }

    /// Logs a failed TLS handshake, at most [`MAX_HANDSHAKES`] per address and [`WINDOW`].
    pub fn handshake(&self, peer: IpAddr, reason: &str) {
        if lock(&self.handshakes).admits(Net::source(peer), Instant::now()) {
            self.warning(format_args!("{peer}: TLS handshake failed: {reason}"));
        }
    }

    /// Logs how many refusals and failed handshakes were suppressed; to be called every second.
    pub fn tick(&self, now: Instant) {
        let refusals = lock(&self.refusals).end(now);
        let handshakes = lock(&self.handshakes).end(now);
        for (ended, event) in [(refusals, "requests refused"), (handshakes, "handshakes failed")] {
            for (peer, count) in ended {
                let peer = peer.map_or("other addresses".into(), |peer| peer.to_string());
                self.info(format_args!("{peer}: {count} more {event} within a minute"));
            }
        }
    }

    fn is_enabled(&self, level: Level) -> bool {
        self.sinks.iter().any(|sink| level >= sink.level)
    }

    pub fn info(&self, event: fmt::Arguments<'_>) {
        self.write(Level::Info, event);
    }

    pub fn warning(&self, event: fmt::Arguments<'_>) {
        self.write(Level::Warning, event);
    }

    pub fn error(&self, event: fmt::Arguments<'_>) {
        self.write(Level::Error, event);
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        for Sink { lines, written, .. } in mem::take(&mut self.sinks) {
            drop(lines); // without a sender, the writer ends after the last line
            let _ = lock(&written).recv_timeout(FLUSH_TIME);
        }
    }
}

struct Sink {
    level: Level,
    lines: SyncSender<String>,
    lost: Arc<Mutex<usize>>,
    /// Closed when all lines are written.
    written: Mutex<Receiver<()>>,
}

impl Sink {
    /// After a lost line, all are lost until the queue is empty, so that the report of them appears
    /// where they are missing.
    fn push(&self, line: &str) {
        let mut lost = lock(&self.lost);
        if *lost > 0 || self.lines.try_send(line.into()).is_err() {
            *lost = lost.saturating_add(1);
        }
    }
}

/// Waits for the next line, or for the report of lines lost before it; `None` at the end.
fn next(queue: &Receiver<String>, lost: &Mutex<usize>) -> Option<String> {
    if let Ok(line) = queue.try_recv() {
        return Some(line);
    }
    let lost = mem::take(&mut *lock(lost));
    if lost == 0 {
        return queue.recv().ok();
    }
    Some(line(Level::Warning, format_args!("the log blocked or failed; lines lost: {lost}")))
}

/// The line for an event of this moment, cut to [`MAX_LINE`].
fn line(level: Level, event: fmt::Arguments<'_>) -> String {
    let mut line = format!("{} {} {event}", Utc(clock::wall()), level.name());
    while line.len() >= MAX_LINE {
        line.pop();
    }
    line.push('\n');
    line
}

/// Writes a line, retrying until it succeeds.
fn write_line(mut file: &File, line: &[u8]) {
    let mut rest = line;
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(count) if count > 0 => rest = rest.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => {
                // An incomplete line is removed from a file; in a pipe, it is completed later.
                let written = line.len().saturating_sub(rest.len());
                if written > 0 && remove_end(file, written).is_ok() {
                    rest = line;
                }
                thread::sleep(RETRY_TIME);
            }
        }
    }
}

/// Removes the last bytes of a regular file.
fn remove_end(mut file: &File, count: usize) -> io::Result<()> {
    let end = file.seek(SeekFrom::End(0))?;
    file.set_len(end.saturating_sub(count as u64))?;
    file.seek(SeekFrom::End(0)).map(drop)
}

/// Since when and how often each address was refused; `None` counts the addresses for which there
/// was no room.
#[derive(Default)]
struct Limiter<const MAX: usize>(HashMap<Option<Net>, (Instant, usize)>);

impl<const MAX: usize> Limiter<MAX> {
    /// Counts a refusal; returns whether it may be logged.
    fn admits(&mut self, peer: Net, now: Instant) -> bool {
        let has_room = self.0.len() < MAX_PEERS || self.0.contains_key(&Some(peer));
        let (_, count) = self.0.entry(has_room.then_some(peer)).or_insert((now, 0));
        *count = count.saturating_add(1);
        *count <= MAX
    }

    /// Removes the addresses whose window has ended; returns how many of each were not logged.
    fn end(&mut self, now: Instant) -> Vec<(Option<Net>, usize)> {
        let ended =
            self.0.extract_if(|_, (since, _)| now.saturating_duration_since(*since) >= WINDOW);
        let suppressed = ended.map(|(peer, (_, n))| (peer, n.saturating_sub(MAX)));
        suppressed.filter(|(_, count)| *count > 0).collect()
    }
}

/// Escapes a client's text for the log: quotes and everything but printable
/// ASCII, so that it cannot end a line or a quotation.
pub fn printable(text: &[u8]) -> impl fmt::Display + '_ {
    text.escape_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sink without a writer, and its queue.
    fn sink_without_writer() -> (Sink, Receiver<String>) {
        let (lines, queue) = mpsc::sync_channel(MAX_QUEUED);
        let written = Mutex::new(mpsc::sync_channel(0).1);
        (Sink { level: Level::Info, lines, lost: Arc::default(), written }, queue)
    }

    #[test]
    fn a_full_queue_loses_lines_and_counts_them() {
        for (pushed, lost) in [(MAX_QUEUED, 0), (MAX_QUEUED + 1, 1), (MAX_QUEUED + 9, 9)] {
            let (sink, queue) = sink_without_writer();
            for n in 0..pushed {
                sink.push(&n.to_string());
            }
            let next = || next(&queue, &sink.lost).unwrap();
            assert_eq!(next(), "0");
            // There is room again, but this line belongs to the same gap.
            sink.push("last");
            let lost = if lost > 0 { lost + 1 } else { 0 };
            assert!((1..MAX_QUEUED).all(|n| next() == n.to_string()));
            match lost {
                0 => assert_eq!(next(), "last"),
                _ => {
                    let report =
                        format!(" WARNING the log blocked or failed; lines lost: {lost}\n");
                    let line = next();
                    assert!(line.ends_with(&report), "{line}");
                }
            }
            sink.push("works again");
            assert_eq!(next(), "works again");
        }
    }

    #[test]
    fn the_last_lines_are_written_and_counted_before_the_queue_ends() {
        let (sink, queue) = sink_without_writer();
        let lost = sink.lost.clone();
        for n in 0..=MAX_QUEUED {
            sink.push(&n.to_string());
        }
        drop(sink);
        let lines: Vec<_> = std::iter::from_fn(|| next(&queue, &lost)).collect();
        assert_eq!(lines.len(), MAX_QUEUED + 1);
        assert!(lines[MAX_QUEUED].ends_with("lines lost: 1\n"));
    }

    #[test]
    fn long_lines_are_cut() {
        let empty = line(Level::Info, format_args!(""));
        for (length, cut) in [(MAX_LINE, MAX_LINE), (MAX_LINE + 1, MAX_LINE)] {
            let line = line(Level::Info, format_args!("{}", "x".repeat(length - empty.len())));
            assert_eq!((line.len(), line.ends_with("x\n")), (cut, true));
        }
        let text = "é".repeat(MAX_LINE);
        assert!(line(Level::Info, format_args!("{text}")).ends_with("é\n"));
    }

    #[test]
    fn refusals_to_one_address_are_limited() {
        let (mut limiter, start) = (Limiter::<MAX_REFUSALS>::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let peer = |n: u32| Net::host(IpAddr::V4(n.into()));
        assert!((0..MAX_REFUSALS).all(|_| limiter.admits(peer(1), start)));
        assert!(!limiter.admits(peer(1), at(1)) && !limiter.admits(peer(1), at(58)));
        assert!((0..MAX_REFUSALS).all(|_| limiter.admits(peer(2), at(2))));
        assert_eq!(limiter.end(at(59)), []);
        assert!(!limiter.admits(peer(1), at(59)));
        assert_eq!(limiter.end(at(60)), [(Some(peer(1)), 3)]);
        assert_eq!(limiter.end(at(61)), []);
        assert!(limiter.admits(peer(1), at(61)) && !limiter.admits(peer(2), at(61)));
        // Addresses beyond MAX_PEERS share one count.
        for n in 10..=u32::try_from(MAX_PEERS).unwrap() + 7 {
            assert!(limiter.admits(peer(n), at(61)));
        }
        assert_eq!(limiter.0.len(), MAX_PEERS);
        assert!(
            (0..MAX_REFUSALS).all(|n| limiter.admits(Net::host([1, 0, 0, n as u8].into()), at(61)))
        );
        assert!(!limiter.admits(peer(0x0200_0000), at(61)));
        assert_eq!(limiter.0.len(), MAX_PEERS + 1);
        assert!(limiter.admits(peer(10), at(61)), "an address keeps its count");
        assert_eq!(limiter.end(at(62)), [(Some(peer(2)), 1)]);
        assert_eq!(limiter.end(at(121)), [(None, 1)]);
        assert_eq!(limiter.0.len(), 0);
    }

    #[test]
    fn removing_an_end_leaves_the_rest_of_the_file() {
        let path = std::env::temp_dir().join(format!("rfw-log-{}", std::process::id()));
        for append in [true, false] {
            let _ = std::fs::remove_file(&path);
            let mut options = File::options();
            let file = options.create(true).write(true).append(append).open(&path).unwrap();
            write_line(&file, b"whole\n");
            (&file).write_all(b"to").unwrap();
            remove_end(&file, 2).unwrap();
            write_line(&file, b"next\n");
            assert_eq!(std::fs::read(&path).unwrap(), b"whole\nnext\n");
            // Truncated by logrotate meanwhile.
            file.set_len(1).unwrap();
            remove_end(&file, 2).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn client_text_stays_on_its_line() {
        let table: [(&[u8], &str); 4] = [
            (b"PUT /drop", "PUT /drop"),
            (b"a\r\n2026-11-22 INFO forged", r"a\r\n2026-11-22 INFO forged"),
            (b"\"\\\x1b[2J\x00", r#"\"\\\x1b[2J\x00"#),
            ("é".as_bytes(), r"\xc3\xa9"),
        ];
        for (text, shown) in table {
            assert_eq!(printable(text).to_string(), shown);
        }
    }

    #[test]
    fn levels_are_ordered() {
        assert!(Level::parse("debug").unwrap() < Level::parse("INFO").unwrap());
        assert!(Level::Error < Level::Critical);
        assert_eq!(Level::parse("WARN"), None);
    }
}
