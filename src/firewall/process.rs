//! The only file that starts a process.
//!
//! A program runs by absolute path, with an argument array and an empty environment. Its input
//! and output pass through socket pairs, which unlike pipes support timeouts.

use super::lock::InstanceLock;
use crate::clock;
use crate::mutex::lock;
use std::fmt::{self, Write as _};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How many bytes of a program's standard error are kept.
const MAX_STDERR: u64 = 4 * 1024;
/// The longest line of a listing in bytes; rfw never writes a longer one.
const MAX_LINE: u64 = 64 * 1024;
/// How many bytes of a program's input are sent at a time.
const PIECE: usize = 16 * 1024;
/// The longest interval between two checks whether a silent child has ended: a child of its own
/// may hold the socket open.
const POLL: Duration = Duration::from_millis(50);
/// The increment of the pauses while rfw waits for a child to end.
const STEP: Duration = Duration::from_micros(20);
/// How long rfw waits for a killed child. Only a child in an uninterruptible system call takes longer.
const KILL_LIMIT: Duration = Duration::from_secs(1);
/// How many killed children may still run; whatever blocks them would block the next one, too.
const MAX_UNREAPED: usize = 16;

/// Why a program failed, as a sentence. After either, only a listing shows what the kernel has
/// accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToolError {
    /// A retry may succeed: the program could not be started, was killed, printed an incomplete
    /// listing or did not get the xtables lock.
    Transient(String),
    /// The program reported this error.
    Rejected(String),
}

impl ToolError {
    pub fn is_transient(&self) -> bool {
        matches!(self, ToolError::Transient(_))
    }
}

impl fmt::Display for ToolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ToolError::Transient(sentence) | ToolError::Rejected(sentence)) = self;
        f.write_str(sentence)
    }
}

/// What all programs share.
#[derive(Default)]
pub struct Programs {
    /// `None` for `rfw -t`, whose programs only read.
    lock: Option<InstanceLock>,
    /// Killed children that have not ended yet.
    unreaped: Mutex<Vec<Child>>,
}

impl Programs {
    pub fn new(lock: InstanceLock) -> Programs {
        Programs { lock: Some(lock), unreaped: Mutex::default() }
    }

    /// Reaps the killed children that have ended; fails if too many still run.
    fn reap(&self) -> io::Result<()> {
        let mut unreaped = lock(&self.unreaped);
        unreaped.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        if unreaped.len() >= MAX_UNREAPED {
            return Err(io::Error::other(format!("{MAX_UNREAPED} programs cannot be killed")));
        }
        Ok(())
    }
}

/// A program, by its absolute path.
#[derive(Clone)]
pub struct Program {
    pub(super) path: PathBuf,
    pub(super) programs: Arc<Programs>,
}

impl Program {
    pub fn new(path: PathBuf, programs: Arc<Programs>) -> Program {
        Program { path, programs }
    }

    /// Runs the program to its end with the input that `input` writes. `limit` includes all of
    /// it.
    pub fn run(
        &self,
        args: &[&str],
        limit: Duration,
        input: impl FnOnce(&mut StdinWriter) -> io::Result<()>,
    ) -> Result<(), ToolError> {
        let (child, socket) = self.start(args, Task::Change, limit)?;
        let mut stdin = StdinWriter { socket, pending: String::new(), deadline: child.deadline };
        let written = input(&mut stdin).and_then(|()| stdin.flush());
        drop(stdin);
        // A program that does not read to the end reports the reason. One that received only a
        // part of its input, or none, may exit with 0 all the same.
        child.finish()?;
        let unwritten = |error| format!("{self} did not receive its input: {error}.");
        written.map_err(|error| ToolError::Transient(unwritten(error)))
    }

    /// Runs the program and passes each line of its output to `each`. When that returns `false`,
    /// the program is killed, which is not an error.
    pub fn read_lines(
        &self,
        args: &[&str],
        limit: Duration,
        mut each: impl FnMut(&str) -> bool,
    ) -> Result<(), ToolError> {
        let (mut child, socket) = self.start(args, Task::List, limit)?;
        let output =
            ChildOutput { socket: &socket, child: &mut child.child, deadline: child.deadline };
        let mut output = BufReader::with_capacity(MAX_LINE as usize, output);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut output).take(MAX_LINE).read_until(b'\n', &mut line) {
                Ok(0) => return child.finish(),
                Ok(_) if each(&String::from_utf8_lossy(&line)) => {}
                Ok(_) => {
                    child.kill();
                    return Ok(());
                }
                Err(error) => return Err(child.unreadable(&error)),
            }
        }
    }

    fn start(
        &self,
        args: &[&str],
        task: Task,
        limit: Duration,
    ) -> Result<(ChildProcess<'_>, UnixStream), ToolError> {
        let spawn = || -> io::Result<_> {
            self.programs.reap()?;
            let (socket, theirs) = pair()?;
            let (stderr, their_stderr) = pair()?;
            // It is read last; until then, output that does not fit is lost instead of blocking the
            // child.
            their_stderr.set_nonblocking(true)?;
            let theirs = OwnedFd::from(theirs);
            let mut command = Command::new(&self.path);
            command.args(args).env_clear().stderr(OwnedFd::from(their_stderr));
            match (task, &self.programs.lock) {
                (Task::List, _) => command.stdin(Stdio::null()).stdout(theirs),
                (Task::Change, Some(lock)) => command.stdin(theirs).stdout(lock.0.try_clone()?),
                (Task::Change, None) => command.stdin(theirs).stdout(Stdio::null()),
            };
            let child = command.spawn()?;
            let deadline = clock::after(limit);
            Ok((ChildProcess { program: self, child, stderr, deadline }, socket))
        };
        spawn()
            .map_err(|error| ToolError::Transient(format!("{self} could not be started: {error}.")))
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// The input of a program, line by line. It is sent in pieces of whole lines, each small enough
/// for a socket to accept at once: if rfw is killed, no program receives half a line.
pub struct StdinWriter {
    socket: UnixStream,
    pending: String,
    deadline: Instant,
}

impl StdinWriter {
    pub fn line(&mut self, line: impl fmt::Display) -> io::Result<()> {
        // Writing to a String never fails.
        let _ = writeln!(self.pending, "{line}");
        if self.pending.len() > PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut rest = self.pending.as_bytes();
        while !rest.is_empty() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            // A timeout of zero would mean no timeout.
            self.socket.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
            let count = self.socket.write(rest)?;
            rest = rest.get(count..).unwrap_or_default();
        }
        self.pending.clear();
        Ok(())
    }
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(POLL))?;
    Ok((ours, theirs))
}

/// The purpose of a child, which decides how it uses its socket.
enum Task {
    /// Its standard input; its standard output is the lock.
    Change,
    /// Its standard output; it has no input.
    List,
}

/// A child, to be killed at its deadline.
struct ChildProcess<'a> {
    program: &'a Program,
    child: Child,
    stderr: UnixStream,
    deadline: Instant,
}

impl ChildProcess<'_> {
    /// Reads the child's standard error, waits for its end and interprets both.
    fn finish(mut self) -> Result<(), ToolError> {
        let mut stderr = Vec::new();
        let mut output =
            ChildOutput { socket: &self.stderr, child: &mut self.child, deadline: self.deadline };
        let read = (&mut output)
            .take(MAX_STDERR)
            .read_to_end(&mut stderr)
            .and_then(|_| io::copy(&mut output, &mut io::sink()));
        let program = self.program;
        let status = read.and_then(|_| self.wait()).map_err(|error| self.unreadable(&error))?;
        let stderr = String::from_utf8_lossy(&stderr);
        let stderr = stderr.split_whitespace().collect::<Vec<_>>().join(" ");
        Err(match status.code() {
            Some(0) => return Ok(()),
            None => ToolError::Transient(format!("{program} was killed by a signal ({status}).")),
            // iptables(8): 4 is a resource problem. iptables-nft uses it also when the kernel rejects
            // a rule, and then prints a message.
            Some(4) if stderr.is_empty() || stderr.contains("xtables lock") => {
                ToolError::Transient(format!("{program}: another program holds the xtables lock."))
            }
            Some(_) if stderr.is_empty() => {
                ToolError::Rejected(format!("{program} failed without a message ({status})."))
            }
            Some(_) => ToolError::Rejected(stderr),
        })
    }

    /// Waits for a child that has closed its end of a socket and is about to exit.
    fn wait(&mut self) -> io::Result<ExitStatus> {
        let mut pause = STEP;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() < self.deadline => thread::sleep(pause),
                None => return Err(ErrorKind::TimedOut.into()),
            }
            pause = pause.saturating_add(STEP).min(POLL);
        }
    }

    /// Kills the child and returns the outcome in words. A child in an uninterruptible system call
    /// is reaped later; until then it may still change the kernel, like any other program, and the
    /// next check repairs that.
    fn kill(mut self) -> String {
        let _ = self.child.kill();
        self.deadline = clock::after(KILL_LIMIT);
        if self.wait().is_ok() {
            return "was killed".into();
        }
        let id = self.child.id();
        lock(&self.program.programs.unreaped).push(self.child);
        format!("cannot be killed (process {id})")
    }

    fn unreadable(self, error: &io::Error) -> ToolError {
        let program = self.program;
        ToolError::Transient(match (error.kind(), self.kill()) {
            (ErrorKind::TimedOut, end) => format!("{program} hung and {end}."),
            (_, end) => format!("{program} could not be read and {end}: {error}."),
        })
    }
}

/// What a child writes to a socket. It ends when the child closes the socket, or when the child
/// has ended and a process that inherited the socket is silent.
struct ChildOutput<'a> {
    socket: &'a UnixStream,
    child: &'a mut Child,
    deadline: Instant,
}

impl Read for ChildOutput<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if Instant::now() >= self.deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            let has_ended = self.child.try_wait()?.is_some();
            match self.socket.read(buffer) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(_) if has_ended => return Ok(0),
                Err(_) => {}
                Ok(count) => return Ok(count),
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn program(path: &str) -> Program {
        Program::new(path.into(), Arc::default())
    }

    /// Makes a program of a shell script. Another program writes it: a file that a child of another test
    /// has open does not run.
    pub fn make_program(name: &str, script: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let write = "PATH=/usr/bin:/bin; printf '#!/bin/sh\nPATH=/usr/bin:/bin\n%s' \"$1\" >\"$2\" && chmod 700 \"$2\"";
        let args = ["-c", write, "sh", script, path.to_str().unwrap()];
        program("/bin/sh").run(&args, Duration::from_secs(60), |_| Ok(())).unwrap();
        path
    }

    fn sh(script: &str, input: &str, limit: u64) -> Result<(), ToolError> {
        let limit = Duration::from_millis(limit);
        program("/bin/sh").run(&["-c", script], limit, |stdin| match input {
            "" => Ok(()),
            _ => stdin.line(input),
        })
    }

    #[test]
    fn how_programs_end() {
        let rejected = |message: &str| Err(ToolError::Rejected(message.into()));
        let transient = |message: &str| Err(ToolError::Transient(format!("/bin/sh {message}.")));
        let locked =
            || Err(ToolError::Transient("/bin/sh: another program holds the xtables lock.".into()));
        let table = [
            ("exit 0", Ok(())),
            ("read a; test \"$a\" = hello", Ok(())),
            ("echo noise; echo noise >&2", Ok(())),
            ("test -z \"$HOME$LANG$USER\"", Ok(())),
            ("exec >&- 2>&-; sleep 0.1; exit 0", Ok(())),
            ("sleep 9 & exit 0", Ok(())),
            ("echo 'No  such' >&2; echo rule >&2; exit 1", rejected("No such rule")),
            ("exit 2", rejected("/bin/sh failed without a message (exit status: 2).")),
            ("exit 4", locked()),
            ("echo RULE_INSERT failed >&2; exit 4", rejected("RULE_INSERT failed")),
            ("echo held: xtables lock >&2; exit 4", locked()),
            ("kill -9 $$", transient("was killed by a signal (signal: 9 (SIGKILL))")),
        ];
        for (script, end) in table {
            let input = if script.starts_with("read") { "hello" } else { "" };
            assert_eq!(sh(script, input, 5_000), end, "{script}");
        }
        let unread = sh("exit 0", &"x".repeat(4 << 20), 5_000).unwrap_err();
        assert!(unread.is_transient() && unread.to_string().contains("its input"), "{unread}");
    }

    #[test]
    fn a_child_past_its_limit_is_killed() {
        let big = "x".repeat(4 << 20);
        let flood = "while :; do echo y >&2; done";
        for script in ["exec sleep 9", flood, "exec 2>&-; exec sleep 9"] {
            let started = Instant::now();
            let hung = ToolError::Transient("/bin/sh hung and was killed.".into());
            assert_eq!(sh(script, &big, 200), Err(hung), "{script}");
            assert!(started.elapsed() < Duration::from_secs(4), "{script}");
        }
    }

    #[test]
    fn what_cannot_be_started() {
        let failure = program("/no/such").run(&[], POLL, |_| Ok(())).unwrap_err();
        assert!(failure.is_transient() && failure.to_string().contains("/no/such"), "{failure}");
    }

    #[test]
    fn listings_are_read_line_by_line() {
        let list = |script: &str, most: usize| {
            let mut seen = Vec::new();
            let each = |line: &str| {
                seen.push(line.trim_end().len());
                seen.len() < most
            };
            let limit = Duration::from_secs(5);
            let end = program("/bin/sh").read_lines(&["-c", script], limit, each);
            (seen, end)
        };
        assert_eq!(list("echo a; echo bc", 9), (vec![1, 2], Ok(())));
        assert_eq!(list("yes", 3), (vec![1, 1, 1], Ok(())));
        assert_eq!(list("sleep 9 & echo a", 9), (vec![1], Ok(())));
        assert_eq!(
            list("echo a; echo why >&2; exit 1", 9).1,
            Err(ToolError::Rejected("why".into()))
        );
        let long = format!("printf '%0{}d' 1", MAX_LINE + 1);
        assert_eq!(list(&long, 9).0, vec![65_536, 1]);
    }

    /// Its standard error is read only after it has read all its input or printed its whole
    /// listing.
    #[test]
    fn a_child_that_floods_its_standard_error_first() {
        let flood = "head -c 4000000 /dev/zero >&2";
        let input = "x".repeat(4 << 20);
        assert_eq!(sh(&format!("{flood}; cat >/dev/null"), &input, 5_000), Ok(()));
        let script = format!("{flood}; echo a");
        let (mut count, limit) = (0, Duration::from_secs(5));
        let end = program("/bin/sh").read_lines(&["-c", &script], limit, |_| {
            count += 1;
            true
        });
        assert_eq!((count, end), (1, Ok(())));
    }

    #[test]
    fn killed_children_that_have_not_ended_are_few_and_reaped() {
        let program = program("/bin/sh");
        let programs = &program.programs;
        let limit = Duration::from_secs(5);
        let sleep = || Command::new("sleep").arg("9").spawn().unwrap();
        let sh = || program.run(&["-c", "exit 0"], limit, |_| Ok(()));
        lock(&programs.unreaped).extend((1..MAX_UNREAPED).map(|_| sleep()));
        assert_eq!(sh(), Ok(()));
        lock(&programs.unreaped).push(sleep());
        let sentence =
            format!("/bin/sh could not be started: {MAX_UNREAPED} programs cannot be killed.");
        assert_eq!(sh(), Err(ToolError::Transient(sentence)));
        lock(&programs.unreaped).iter_mut().for_each(|child| child.kill().unwrap());
        let from = Instant::now();
        while programs.reap().is_err() || !lock(&programs.unreaped).is_empty() {
            assert!(from.elapsed() < limit, "not reaped");
        }
        assert_eq!(sh(), Ok(()));
    }
}
