//! The client, `rfwc`: one request to one server, or to many at once.
//!
//! In this order: [`options`], from arguments and files to a job; here, the
//! threads and the report; [`batch`], the same for a stream of jobs;
//! [`exchange`], the request to one server.

pub mod batch;
pub mod exchange;
pub mod options;

use crate::mutex::lock;
use exchange::Request;
use options::{Command, Fleet, Job, Server, USAGE};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::{self, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::{env, mem, thread};

/// How many servers are contacted at a time, each by its own thread: more than most fleets have, so
/// that a server that does not respond delays no other.
const MAX_AT_ONCE: usize = 256;
/// The stack size of a thread; resolving a host name uses most of it.
const STACK: usize = 512 * 1024;
/// The longest line in bytes of a body, if several servers send one.
const MAX_LINE: usize = 64 * 1024;
/// The width of the progress bar, and that of its whole line.
const BAR: usize = 30;
const COLUMNS: usize = 70;

/// Carries out a command line without the program's name. Exit status: 0 all servers succeeded, 1
/// some failed or the output cannot be written, 2 wrong usage.
pub fn main(args: impl Iterator<Item = String>) -> ExitCode {
    let text = match options::parse(args, env::var("RFW_CREDENTIALS").ok()) {
        Ok(Command::Send(fleet, job)) => return send(&fleet, &job),
        Ok(Command::Batch(fleet, source, query)) => return batch::run(&fleet, source, &query),
        Ok(Command::Help) => USAGE,
        Ok(Command::Version) => concat!("rfwc ", env!("CARGO_PKG_VERSION"), "\n"),
        Err(message) => {
            let _ = writeln!(io::stderr(), "rfwc: {message}");
            return ExitCode::from(2);
        }
    };
    let mut report = Report::default();
    report.print_result(text.as_bytes());
    report.finish()
}

fn send(fleet: &Fleet, job: &Job) -> ExitCode {
    let total = fleet.servers.len();
    let bar = total > 1 && io::stderr().is_terminal();
    let body_only = total == 1 && job.method == "GET";
    let report = Mutex::new(Report { total, bar, body_only, ..Report::default() });
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(server) = fleet.servers.get(next.fetch_add(1, Relaxed)) {
            send_to_one(Request { fleet, server, job }, &report);
        }
    };
    lock(&report).draw();
    thread::scope(|scope| {
        for _ in 1..total.min(MAX_AT_ONCE) {
            // If no more threads can be started, the others do all the work.
            let _ = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        }
        work();
    });
    lock(&report).finish()
}

/// Sends the request to one server and reports the result.
fn send_to_one(request: Request<'_>, report: &Mutex<Report>) {
    let Request { fleet, server, .. } = request;
    let name = format!("{}: ", server.name);
    let is_only_server = fleet.servers.len() == 1;
    let mut partial = Vec::new();
    let mut print_lines = |bytes: &[u8]| {
        let mut text = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            partial.extend(piece);
            if piece.ends_with(b"\n") {
                text.extend([name.as_bytes(), &mem::take(&mut partial)].concat());
            } else if partial.len() > MAX_LINE {
                return Err(io::Error::other("a line of the body is too long"));
            }
        }
        lock(report).print(&text)
    };
    let result = exchange::send(request, &mut None, &mut |bytes| {
        let written = if is_only_server { lock(report).print(bytes) } else { print_lines(bytes) };
        // The reader has closed the pipe. A `get` changes nothing, so rfwc can exit at once.
        if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe) {
            process::exit(1);
        }
        written
    });
    let mut report = lock(report);
    if !partial.is_empty() {
        partial.push(b'\n');
        report.print_result(&[name.as_bytes(), &partial].concat());
    }
    let result = result.map_err(|failure| failure.message);
    report.record(server, &result);
}

/// The progress, and the only writer of standard output and standard error meanwhile.
#[derive(Default)]
struct Report {
    total: usize,
    done: usize,
    /// The servers that failed.
    failed: Vec<String>,
    /// Whether to draw a progress bar.
    bar: bool,
    /// Whether standard output is for the body of a response only. An error then goes to standard
    /// error, as a comment in the list of servers.
    body_only: bool,
    /// The first error in writing the results.
    write_error: Option<io::Error>,
}

impl Report {
    /// Records and prints the result of a server.
    fn record(&mut self, server: &Server, result: &Result<String, String>) {
        let (Ok(message) | Err(message)) = result;
        // A server must not control the terminal.
        let line = format!("{}: {}\n", server.name, message.replace(char::is_control, "?"));
        if result.is_err() && !self.failed.contains(&server.name) {
            self.failed.push(server.name.clone());
        }
        if self.body_only && result.is_err() {
            let _ = write!(io::stderr(), "# {line}");
        } else if !message.is_empty() {
            self.print_result(line.as_bytes());
        }
        self.done = self.done.saturating_add(1);
        self.draw();
    }

    /// Names the servers that failed, unless a terminal shows them already, and returns the exit
    /// status.
    fn finish(&self) -> ExitCode {
        self.clear();
        let is_shown = io::stderr().is_terminal() && (self.body_only || io::stdout().is_terminal());
        for name in self.failed.iter().filter(|_| !is_shown) {
            let _ = writeln!(io::stderr(), "{name}");
        }
        if let Some(error) = &self.write_error {
            let _ = writeln!(io::stderr(), "rfwc: cannot write to standard output: {error}");
        }
        ExitCode::from(u8::from(self.write_error.is_some() || !self.failed.is_empty()))
    }

    fn print_result(&mut self, bytes: &[u8]) {
        if let Err(error) = self.print(bytes) {
            self.write_error.get_or_insert(error);
        }
    }

    fn print(&self, bytes: &[u8]) -> io::Result<()> {
        self.clear();
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())
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
