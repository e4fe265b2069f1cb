//! The only file that starts a process.
//!
//! By absolute path, with an argument array and an empty environment. What
//! goes in and out passes through socket pairs, because those, unlike pipes,
//! can be waited for with a time limit.

use std::fmt::{self, Write as _};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::mem;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How many bytes of a program's standard error are kept.
const MAX_WORDS: u64 = 4 * 1024;
/// The longest line of a listing; a longer one is no line of ours.
const MAX_LINE: u64 = 64 * 1024;
/// How much of a program's input is sent at a time.
const PIECE: usize = 16 * 1024;
/// How often a silent child is looked after: it may be gone and have left its
/// end of a socket to a child of its own.
const LOOK: Duration = Duration::from_millis(50);

/// By how much longer each pause is in which a child ends.
const STEP: Duration = Duration::from_micros(20);

/// What went wrong with a program, as a sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The same may work in a moment: it could not be started, was ended, or
    /// did not get the xtables lock. Nobody knows what the kernel has taken.
    Passing(String),
    /// It said no, in these words.
    Refused(String),
    /// There is no room for so many; what to do.
    Full(&'static str),
    /// The state file did not take it.
    State(String),
}

impl Failure {
    pub fn is_passing(&self) -> bool {
        matches!(self, Failure::Passing(_))
    }

    /// With more words.
    pub fn and(self, words: &str) -> Failure {
        match self {
            Failure::Passing(sentence) => Failure::Passing(sentence + words),
            Failure::Refused(sentence) => Failure::Refused(sentence + words),
            failure => failure,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Passing(sentence) | Failure::Refused(sentence) | Failure::State(sentence) => {
                f.write_str(sentence)
            }
            Failure::Full(sentence) => f.write_str(sentence),
        }
    }
}

/// Held by rfw and, as their standard output, by the programs that change
/// rules: while one of them lives, no other rfw starts in this network
/// namespace. So a program that outlives a killed rfw is waited for, and what
/// it does is read back at start. An abstract socket goes with its last holder.
pub struct Presence(UnixDatagram);

impl Presence {
    /// Waits for what a former rfw has left. The error is a sentence.
    pub fn take(limit: Duration) -> Result<Presence, String> {
        let wrong = |error: io::Error| format!("cannot make a socket: {error}");
        let name = SocketAddr::from_abstract_name("rfw").map_err(wrong)?;
        let started = Instant::now();
        loop {
            match UnixDatagram::bind_addr(&name) {
                Ok(socket) => return Ok(Presence(socket)),
                Err(error) if error.kind() != ErrorKind::AddrInUse => return Err(wrong(error)),
                Err(_) if started.elapsed() < limit => thread::sleep(Duration::from_millis(1)),
                Err(_) => return Err("another rfw runs here; stop it first".into()),
            }
        }
    }
}

/// Runs a program, to its end, on what `input` writes.
pub fn run(
    presence: &Presence,
    program: &Path,
    args: &[&str],
    limit: Duration,
    input: impl FnOnce(&mut Feed<'_>) -> io::Result<()>,
) -> Result<(), Failure> {
    let held = presence.0.try_clone().map_err(|error| cannot_start(program, &error))?;
    let (ours, theirs) = pair(program)?;
    let (stdin, stdout) = (Stdio::from(theirs), Stdio::from(OwnedFd::from(held)));
    let running = Running::start(program, args, stdin, stdout, limit)?;
    let fed = ours.set_write_timeout(Some(limit)).and_then(|()| {
        let mut feed = Feed { socket: &ours, pending: String::new() };
        input(&mut feed).and_then(|()| feed.flush())
    });
    drop(ours);
    // A program that does not read to the end says why; one that got a part of its
    // input, or nothing, may take that for all and be content.
    running.finish().and_then(|()| {
        let unfed = |error| format!("{} did not get its input: {error}.", program.display());
        fed.map_err(|error| Failure::Passing(unfed(error)))
    })
}

/// The input of a program, line by line. It is sent in pieces that end with a
/// line, each so small that a socket takes it whole or not at all: where rfw is
/// killed, a program never gets half a line.
pub struct Feed<'a> {
    socket: &'a UnixStream,
    pending: String,
}

impl Feed<'_> {
    pub fn line(&mut self, line: impl fmt::Display) -> io::Result<()> {
        // A String takes everything.
        let _ = writeln!(self.pending, "{line}");
        if self.pending.len() > PIECE { self.flush() } else { Ok(()) }
    }

    pub fn flush(&mut self) -> io::Result<()> {
        let pending = mem::take(&mut self.pending);
        self.socket.write_all(pending.as_bytes())
    }
}

/// Runs a program and hands on each line of its output, until one is answered
/// with `false`: then the program is ended, and that is no failure.
pub fn lines(
    program: &Path,
    args: &[&str],
    limit: Duration,
    mut each: impl FnMut(&str) -> bool,
) -> Result<(), Failure> {
    let (ours, theirs) = pair(program)?;
    let mut running = Running::start(program, args, Stdio::null(), Stdio::from(theirs), limit)?;
    let mut output = BufReader::with_capacity(MAX_LINE as usize, running.watch(&ours));
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut output).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) if each(&String::from_utf8_lossy(&line)) => {}
            Ok(_) => {
                running.end();
                return Ok(());
            }
            Err(_) => return Err(running.hung()),
        }
    }
    running.finish()
}

fn pair(program: &Path) -> Result<(UnixStream, OwnedFd), Failure> {
    let pair = UnixStream::pair().and_then(|(ours, theirs)| {
        ours.set_read_timeout(Some(LOOK))?;
        Ok((ours, OwnedFd::from(theirs)))
    });
    pair.map_err(|error| cannot_start(program, &error))
}

fn cannot_start(program: &Path, error: &io::Error) -> Failure {
    Failure::Passing(format!("{} could not be started: {error}.", program.display()))
}

/// A child, to be ended by its deadline.
struct Running {
    name: String,
    child: Child,
    errors: UnixStream,
    deadline: Instant,
}

impl Running {
    fn start(
        program: &Path,
        args: &[&str],
        stdin: Stdio,
        stdout: Stdio,
        limit: Duration,
    ) -> Result<Running, Failure> {
        let (errors, theirs) = pair(program)?;
        let mut command = Command::new(program);
        command.args(args).env_clear().stdin(stdin).stdout(stdout).stderr(theirs);
        let child = command.spawn().map_err(|error| cannot_start(program, &error))?;
        let now = Instant::now();
        let deadline = now.checked_add(limit).unwrap_or(now);
        Ok(Running { name: program.display().to_string(), child, errors, deadline })
    }

    fn watch<'a>(&'a mut self, socket: &'a UnixStream) -> Watched<'a> {
        Watched { socket, child: &mut self.child, deadline: self.deadline }
    }

    /// Reads what the child has to say, waits for its end, and judges it.
    fn finish(mut self) -> Result<(), Failure> {
        let mut words = Vec::new();
        let mut errors =
            Watched { socket: &self.errors, child: &mut self.child, deadline: self.deadline };
        let read = (&mut errors)
            .take(MAX_WORDS)
            .read_to_end(&mut words)
            .and_then(|_| io::copy(&mut errors, &mut io::sink()));
        let Some(status) = read.ok().and_then(|_| self.wait()) else {
            return Err(self.hung());
        };
        let words =
            String::from_utf8_lossy(&words).split_whitespace().collect::<Vec<_>>().join(" ");
        judge(&self.name, status, words)
    }

    /// Waits for a child that has closed its end, so it will not be long.
    fn wait(&mut self) -> Option<ExitStatus> {
        let mut pause = STEP;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < self.deadline => thread::sleep(pause),
                _ => return None,
            }
            pause = pause.saturating_add(STEP).min(LOOK);
        }
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn hung(mut self) -> Failure {
        self.end();
        Failure::Passing(format!("{} hung and was killed.", self.name))
    }
}

fn judge(name: &str, status: ExitStatus, words: String) -> Result<(), Failure> {
    match status.code() {
        Some(0) => Ok(()),
        None => Err(Failure::Passing(format!("{name} was ended by a signal ({status})."))),
        // iptables(8): 4 is a resource problem; iptables-nft also exits so
        // where the kernel refuses a rule, and then says so.
        Some(4) if words.is_empty() || words.contains("xtables lock") => {
            let who = "that another program holds";
            Err(Failure::Passing(format!("{name} waited in vain for the xtables lock {who}.")))
        }
        Some(_) if words.is_empty() => {
            Err(Failure::Refused(format!("{name} ended with {status} and said nothing.")))
        }
        Some(_) => Err(Failure::Refused(words)),
    }
}

/// The child's end of a socket: it is over when the child closes it, or when
/// the child is gone and whoever has inherited it is silent.
struct Watched<'a> {
    socket: &'a UnixStream,
    child: &'a mut Child,
    deadline: Instant,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if Instant::now() >= self.deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            let gone = self.child.try_wait()?.is_some();
            match self.socket.read(buffer) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(_) if gone => return Ok(0),
                Err(_) => {}
                Ok(count) => return Ok(count),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that excludes nobody.
    fn presence() -> Presence {
        Presence(UnixDatagram::unbound().unwrap())
    }

    fn sh(script: &str, input: &str, limit: u64) -> Result<(), Failure> {
        let limit = Duration::from_millis(limit);
        run(&presence(), Path::new("/bin/sh"), &["-c", script], limit, |stdin| match input {
            "" => Ok(()),
            _ => stdin.line(input),
        })
    }

    #[test]
    fn how_programs_end() {
        let refused = |words: &str| Err(Failure::Refused(words.into()));
        let passing = |words: &str| Err(Failure::Passing(format!("/bin/sh {words}.")));
        let locked = || passing("waited in vain for the xtables lock that another program holds");
        let table = [
            ("exit 0", Ok(())),
            ("read a; test \"$a\" = hello", Ok(())),
            ("echo noise; echo noise >&2", Ok(())),
            ("test -z \"$HOME$LANG$USER\"", Ok(())),
            ("exec >&- 2>&-; sleep 0.1; exit 0", Ok(())),
            ("sleep 3 & exit 0", Ok(())),
            ("echo 'No  such' >&2; echo rule >&2; exit 1", refused("No such rule")),
            ("exit 2", refused("/bin/sh ended with exit status: 2 and said nothing.")),
            ("exit 4", locked()),
            ("echo RULE_INSERT failed >&2; exit 4", refused("RULE_INSERT failed")),
            ("echo held: xtables lock >&2; exit 4", locked()),
            ("kill -9 $$", passing("was ended by a signal (signal: 9 (SIGKILL))")),
        ];
        for (script, end) in table {
            let input = if script.starts_with("read") { "hello" } else { "" };
            assert_eq!(sh(script, input, 2_000), end, "{script}");
        }
        let unread = sh("exit 0", &"x".repeat(4 << 20), 2_000).unwrap_err();
        assert!(unread.is_passing() && unread.to_string().contains("its input"), "{unread}");
    }

    #[test]
    fn a_child_past_its_limit_is_killed() {
        let big = "x".repeat(4 << 20);
        for script in ["exec sleep 9", "exec yes >&2", "exec 2>&-; exec sleep 9"] {
            let started = Instant::now();
            let hung = Failure::Passing("/bin/sh hung and was killed.".into());
            assert_eq!(sh(script, &big, 200), Err(hung), "{script}");
            assert!(started.elapsed() < Duration::from_secs(4), "{script}");
        }
    }

    #[test]
    fn what_cannot_be_started() {
        let failure = run(&presence(), Path::new("/no/such"), &[], LOOK, |_| Ok(())).unwrap_err();
        assert!(failure.is_passing() && failure.to_string().contains("/no/such"), "{failure}");
    }

    #[test]
    fn listings_are_read_line_by_line() {
        let list = |script: &str, most: usize| {
            let mut seen = Vec::new();
            let each = |line: &str| {
                seen.push(line.trim_end().len());
                seen.len() < most
            };
            let end = lines(Path::new("/bin/sh"), &["-c", script], Duration::from_secs(2), each);
            (seen, end)
        };
        assert_eq!(list("echo a; echo bc", 9), (vec![1, 2], Ok(())));
        assert_eq!(list("yes", 3), (vec![1, 1, 1], Ok(())));
        assert_eq!(list("echo a; echo why >&2; exit 1", 9).1, Err(Failure::Refused("why".into())));
        let long = format!("printf '%0{}d' 1", MAX_LINE + 1);
        assert_eq!(list(&long, 9).0, vec![65_536, 1]);
    }
}
