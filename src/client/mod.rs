//! The client, `rfwc`: one request to one server, or to many at once.
//!
//! In this order: [`options`], from arguments and files to a job; here, the
//! threads and what they report; [`batch`], the same for a stream of jobs;
//! [`exchange`], the request to one server.

pub mod batch;
pub mod exchange;
pub mod options;

use crate::mutex::lock;
use exchange::Request;
use options::{Ask, Fleet, Job, Server, USAGE};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::{self, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::{env, mem, thread};

/// Servers that are asked at a time, a thread each: more than most fleets have,
/// so that those that do not answer hold up nobody.
const MAX_AT_ONCE: usize = 256;
/// What a thread may use as stack; looking up a name takes most.
const STACK: usize = 512 * 1024;
/// The longest line of a body in bytes where several servers send theirs.
const MAX_LINE: usize = 64 * 1024;
/// The marks of the bar, and all its columns.
const BAR: usize = 30;
const COLUMNS: usize = 70;

/// Carries out a command line without the program's name. Exit status: 0 all
/// servers did it, 1 some did not or the output cannot be written, 2 wrong usage.
pub fn main(args: impl Iterator<Item = String>) -> ExitCode {
    let text = match options::parse(args, env::var("RFW_CREDENTIALS").ok()) {
        Ok(Ask::Send(fleet, job)) => return send(&fleet, &job),
        Ok(Ask::Batch(fleet, source, query)) => return batch::run(&fleet, source, &query),
        Ok(Ask::Help) => USAGE,
        Ok(Ask::Version) => concat!("rfwc ", env!("CARGO_PKG_VERSION"), "\n"),
        Err(message) => {
            let _ = writeln!(io::stderr(), "rfwc: {message}");
            return ExitCode::from(2);
        }
    };
    ExitCode::from(u8::from(!is_written(&print(text.as_bytes()))))
}

/// Writes to standard output.
fn print(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}

/// Says on standard error why the output is not.
fn is_written(result: &io::Result<()>) -> bool {
    if let Err(error) = result {
        let _ = writeln!(io::stderr(), "rfwc: cannot write to standard output: {error}");
    }
    result.is_ok()
}

fn send(fleet: &Fleet, job: &Job) -> ExitCode {
    let total = fleet.servers.len();
    let bar = total > 1 && io::stderr().is_terminal();
    let report = Mutex::new(Report::new(total, bar));
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(server) = fleet.servers.get(next.fetch_add(1, Relaxed)) {
            ask(Request { fleet, server, job }, &report);
        }
    };
    lock(&report).draw();
    thread::scope(|scope| {
        for _ in 1..total.min(MAX_AT_ONCE) {
            // Where there is no room for more threads, those that are there do it all.
            let _ = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        }
        work();
    });
    lock(&report).finish()
}

/// Asks one server, and reports.
fn ask(request: Request<'_>, report: &Mutex<Report>) {
    let Request { fleet, server, job } = request;
    let name = format!("{}: ", server.name);
    let alone = fleet.servers.len() == 1;
    let mut begun = Vec::new();
    let mut print_lines = |bytes: &[u8]| {
        let mut text = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            begun.extend(piece);
            if piece.ends_with(b"\n") {
                text.extend([name.as_bytes(), &mem::take(&mut begun)].concat());
            } else if begun.len() > MAX_LINE {
                return Err(io::Error::other("a line of the body is too long"));
            }
        }
        lock(report).print(&text)
    };
    let result = exchange::ask(request, &mut None, &mut |bytes| {
        let written = if alone { lock(report).print(bytes) } else { print_lines(bytes) };
        // The reader has seen enough; a `get` changes nothing, so nobody misses the rest.
        if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe) {
            process::exit(1);
        }
        written
    });
    let mut report = lock(report);
    if !begun.is_empty() {
        begun.push(b'\n');
        report.print_result(&[name.as_bytes(), &begun].concat());
    }
    report.end(server, &result.map_err(|failure| failure.words), alone && job.method == "GET");
}

/// How far it is, and the only writer of what is written meanwhile.
struct Report {
    total: usize,
    done: usize,
    /// The servers that failed.
    failed: Vec<String>,
    /// Whether standard error has got the sentence about one of them.
    is_told: bool,
    /// Whether standard error is a terminal, and there is something to wait for.
    bar: bool,
    /// Whether the results could be written; the first error.
    written: io::Result<()>,
}

impl Report {
    fn new(total: usize, bar: bool) -> Report {
        Report { total, done: 0, failed: Vec::new(), is_told: false, bar, written: Ok(()) }
    }

    /// Takes the result of a server. Where standard output is for a body, it goes
    /// to standard error, as a comment in a list of servers.
    fn end(&mut self, server: &Server, result: &Result<String, String>, beside: bool) {
        let (Ok(words) | Err(words)) = result;
        // What came from a server colours no terminal.
        let line = format!("{}: {}\n", server.name, words.replace(char::is_control, "?"));
        if result.is_err() && !self.failed.contains(&server.name) {
            self.failed.push(server.name.clone());
        }
        if beside && result.is_err() {
            let _ = write!(io::stderr(), "# {line}");
            self.is_told = true;
        } else if !words.is_empty() {
            self.print_result(line.as_bytes());
        }
        self.done = self.done.saturating_add(1);
        self.draw();
    }

    /// Names the servers that failed, unless a terminal shows them already, and returns the exit
    /// status.
    fn finish(&self) -> ExitCode {
        self.clear();
        let is_shown = io::stderr().is_terminal() && (self.is_told || io::stdout().is_terminal());
        for name in self.failed.iter().filter(|_| !is_shown) {
            let _ = writeln!(io::stderr(), "{name}");
        }
        let written = is_written(&self.written);
        ExitCode::from(u8::from(!written || !self.failed.is_empty()))
    }

    fn print_result(&mut self, bytes: &[u8]) {
        let printed = self.print(bytes);
        if self.written.is_ok() {
            self.written = printed;
        }
    }

    fn print(&self, bytes: &[u8]) -> io::Result<()> {
        self.clear();
        print(bytes)
    }

    fn draw(&self) {
        if self.bar {
            let marks = self.done.saturating_mul(BAR).checked_div(self.total).unwrap_or(BAR);
            let (marks, done, failed) = ("#".repeat(marks), self.done, self.failed.len());
            let text = format!("[{marks:.<BAR$}] {done} of {}, {failed} failed", self.total);
            let _ = write!(io::stderr(), "\r{text}");
        }
    }

    fn clear(&self) {
        if self.bar {
            let _ = write!(io::stderr(), "\r{:COLUMNS$}\r", "");
        }
    }
}
