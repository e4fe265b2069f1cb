//! The laboratory. Outside, `both` and `once` run this test program again under `unshare`, once for
//! each variant of iptables; inside, with `RFW_E2E` set, they run the body of the test.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use std::{any, env, thread};

pub const LOCAL: &str = "127.0.0.1:7390";
pub const OUTWARD: &str = "127.0.0.1:7393";

/// The line of rfw.conf that keeps addresses in sets.
pub const SETS: &str = "ipset.path = /usr/sbin/ipset";

/// Routes packets to and from 10.9.9.0/24 and fd09::/64 back to this host. They are not its own
/// addresses, so rfw can block them.
pub const STRANGERS: &str = "
    ip route add local 10.9.9.0/24 dev lo; ip route add local fd09::/64 dev lo
    echo 1 > /proc/sys/net/ipv6/ip_nonlocal_bind";

/// Seconds that a busy machine may add to any time limit.
pub const SLACK: u64 = 4;

const TEST_SECONDS: &str = "240";

/// Runs `body` with iptables-nft and with iptables-legacy.
pub fn both<F: Fn(&Lab)>(body: F) {
    run(&["nft", "legacy"], body);
}

/// Runs `body` with one variant of iptables, if the variant makes no difference.
pub fn once<F: Fn(&Lab)>(body: F) {
    run(&["nft"], body);
}

pub fn legacy<F: Fn(&Lab)>(body: F) {
    run(&["legacy"], body);
}

/// Inside a test, runs `body` with a rule for each address (`false`) and then with sets (`true`),
/// with `lines` in rfw.conf; the kernel is emptied in between.
pub fn modes(lab: &Lab, lines: &str, body: impl Fn(&mut Rfw<'_>, bool)) {
    for (mode, sets) in [("", false), (SETS, true)] {
        println!("mode: {mode}"); // for the reader of a failure
        let mut rfw = lab.start(&format!("local.server\n{lines}\n{mode}"));
        body(&mut rfw, sets);
        drop(rfw);
        lab.reboot();
    }
}

/// The user of a confined rfw.
const NOBODY: u32 = 65_534;

fn is_confined() -> bool {
    env::var_os("RFW_CONFINED").is_some()
}

/// Does what RuntimeDirectory= and LoadCredential= of the unit do: only the directory's owner may hold
/// rfw's lock, and rfw reads only files of its own user and of root.
fn give_files(user: u32) {
    if is_confined() {
        let other = if user == 0 { NOBODY } else { 0 };
        sh(&format!("mkdir -p -m 700 rfw; chown -R --from={other} {user} rfw lab"));
    }
}

fn run<F: Fn(&Lab)>(variants: &[&str], body: F) {
    if let (Ok(variant), Ok(outside)) = (env::var("RFW_E2E"), env::var("RFW_E2E_OUTSIDE")) {
        return body(&Lab::open(&variant, &outside));
    }
    // "e2e::api::rows::{{closure}}" → "api::rows"
    let name = any::type_name::<F>().trim_end_matches("::{{closure}}");
    let name = name.split_once("::").expect("a path").1;
    thread::scope(|scope| {
        // iptables-legacy needs root for its lock.
        for variant in variants.iter().filter(|variant| **variant == "nft" || !is_confined()) {
            scope.spawn(move || run_inside(name, variant));
        }
    });
}

fn run_inside(name: &str, variant: &str) {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    // When one of these ends, so does everything that it started. sh waits for orphans, as process 1 must.
    let sh = "umask 022; \"$@\"; exit $?";
    let out = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", if root { "-nmp" } else { "-rnmp" }])
        .args(["--fork", "--kill-child", "--mount-proc", "sh", "-c", sh, "sh"])
        .args(["timeout", "-s", "KILL", TEST_SECONDS])
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("RUST_BACKTRACE", "0")
        .env("RFW_E2E", variant)
        .env("RFW_E2E_OUTSIDE", network_namespace())
        .output()
        .expect("setpriv and unshare (util-linux) are needed");
    let said = text(&out);
    assert!(
        said.contains("running 1 test"),
        "no private network namespace can be made here: run as root, or allow user namespaces\n{said}"
    );
    assert!(
        out.status.success() && said.contains("1 passed"),
        "{name} with iptables-{variant}: {} ({TEST_SECONDS} s at most)\n{said}",
        out.status
    );
    for line in said.lines().filter(|line| line.starts_with("SKIPPED: ")) {
        drop(writeln!(io::stderr(), "{line}"));
    }
}

/// Whether strace is installed, which `test` or a part of it needs.
pub fn has_strace(test: &str) -> bool {
    Path::new("/usr/bin/strace").exists() || skip(test, "no strace")
}

/// Whether there are other users than root: not in a user namespace.
pub fn has_users(test: &str) -> bool {
    !is_in_user_namespace() || skip(test, "not as root")
}

pub fn is_in_user_namespace() -> bool {
    !fs::read_to_string("/proc/self/uid_map").unwrap().contains("4294967295")
}

/// `make test` counts what is skipped: it is reported on the real standard error, because the output of
/// a passed test is not shown.
fn skip(test: &str, reason: &str) -> bool {
    drop(writeln!(io::stderr(), "SKIPPED: {test} ({reason})"));
    false
}

fn network_namespace() -> PathBuf {
    fs::read_link("/proc/self/ns/net").expect("/proc is needed")
}

/// A private network and a private /run for all files of the test; both are removed with it.
pub struct Lab {
    pub dir: PathBuf,
    variant: String,
}

impl Lab {
    fn open(variant: &str, outside: &str) -> Lab {
        let refused = "a test never runs in the host's own network namespace";
        assert_ne!(network_namespace(), Path::new(outside), "{refused}");
        sh(
            "mount -t tmpfs -o mode=755 lab /run; mkdir -m 700 /run/netns /run/lab; ip link set lo up",
        );
        let lab = Lab { dir: "/run/lab".into(), variant: variant.into() };
        lab.write("white.list", "192.0.2.1\n");
        lab
    }

    pub fn write(&self, name: &str, content: &str) {
        let (path, new) = (self.dir.join(name), self.dir.join("new"));
        fs::write(&new, content).unwrap();
        fs::set_permissions(&new, Permissions::from_mode(0o600)).unwrap();
        fs::rename(new, path).unwrap();
    }

    /// Writes a file for a stand-in, which may be run by a confined rfw.
    pub fn write_data(&self, name: &str, content: &str) {
        self.write(name, content);
        if is_confined() {
            chown(self.dir.join(name), Some(NOBODY), None).unwrap();
        }
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    /// rfw.log with everything logged so far: waits for the line of a request that is sent now.
    pub fn log(&self) -> String {
        static CALLS: AtomicUsize = AtomicUsize::new(1);
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        // A different spelling each time: its letters escaped or not.
        let letter = |(n, c): (usize, char)| match call >> n & 1 {
            0 => c.to_string(),
            _ => format!("%{:x}", u32::from(c)),
        };
        let request =
            format!("GET /{}", "metrics".chars().enumerate().map(letter).collect::<String>());
        let count = || self.read("rfw.log").matches(&format!("\"{request}\"")).count();
        let before = count();
        assert_eq!(ask(&request).status, 200);
        await_true("the log has the last line", 10 + SLACK, || count() > before);
        self.read("rfw.log")
    }

    /// Empties rfw.log under a running rfw.
    pub fn clear_log(&self) {
        fs::write(self.dir.join("rfw.log"), "").unwrap();
    }

    /// The real program: "iptables" → /usr/sbin/iptables-nft.
    pub fn real(&self, program: &str) -> String {
        if program == "ipset" {
            return "/usr/sbin/ipset".into();
        }
        let (family, restore) = program.split_at(program.find('-').unwrap_or(program.len()));
        format!("/usr/sbin/{family}-{}{restore}", self.variant)
    }

    /// The path for `iptables.path`: the real program, or its stand-in if there is one.
    pub fn iptables_path(&self) -> String {
        let stand_in = self.dir.join("bin/iptables");
        let real = self.real("iptables");
        if stand_in.exists() { stand_in.to_str().unwrap().into() } else { real }
    }

    /// Replaces iptables, iptables-restore, the two of IPv6 and ipset by scripts that run `body` (with
    /// `$me`, `$real` and `$lab`) and then, unless it exited, the real program.
    pub fn stand_in(&self, body: &str) {
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin).unwrap();
        for me in ["iptables", "iptables-restore", "ip6tables", "ip6tables-restore", "ipset"] {
            let real = self.real(me);
            let head = format!("#!/bin/sh\nme={me} real={real} lab={}\n", self.dir.display());
            fs::write(bin.join("new"), format!("{head}{body}\nexec $real \"$@\"\n")).unwrap();
            fs::set_permissions(bin.join("new"), Permissions::from_mode(0o755)).unwrap();
            fs::rename(bin.join("new"), bin.join(me)).unwrap();
        }
    }

    /// The same for changes only: a call that only reads runs the real program.
    pub fn stand_in_for_changes(&self, body: &str) {
        self.stand_in(&format!(
            "case \"$me $*\" in *restore*|*\" -I \"*|*\" -D \"*)\n{body}\n;; esac"
        ));
    }

    /// What an administrator types: `lab.iptables("-I INPUT -s 9.9.9.9 -j DROP")`.
    pub fn iptables(&self, arguments: &str) -> String {
        sh(&format!("{} -w {arguments}", self.real("iptables")))
    }

    pub fn ip6tables(&self, arguments: &str) -> String {
        sh(&format!("{} -w {arguments}", self.real("ip6tables")))
    }

    pub fn ipset(&self, arguments: &str) -> String {
        sh(&format!("/usr/sbin/ipset {arguments}"))
    }

    /// Removes all rules and sets of rfw from the kernel, as a reboot does.
    pub fn reboot(&self) {
        self.iptables("-F");
        self.ip6tables("-F");
        self.ipset("destroy");
    }

    /// Inserts many rules of rfw, as from a previous run: 10.0.0.1, 10.0.1.1 and so on. Returns how
    /// many.
    pub fn seed(&self, wanted: usize, comment: &str) -> usize {
        // In a user namespace, iptables-nft takes fewer at once.
        let count = if is_in_user_namespace() { wanted.min(250) } else { wanted };
        let tail = format!("-m comment --comment {comment} -j DROP\n");
        let line = |n| format!("-A INPUT -s 10.{}.{}.1 {tail}", n / 256, n % 256);
        let lines: String = (0..count).map(line).collect();
        self.write("rules", &format!("*filter\n{lines}COMMIT\n"));
        sh(&format!("{} --noflush -w < /run/lab/rules", self.real("iptables-restore")));
        count
    }

    /// rfw's rules in kernel order, IPv4 first: `INPUT -s 1.2.3.4/32 -i eth0 -j DROP [rfw:1795431795]`.
    pub fn rules(&self) -> Vec<String> {
        self.tagged(|tag| tag != "rfw:guard")
    }

    pub fn guards(&self) -> Vec<String> {
        self.tagged(|tag| tag == "rfw:guard")
    }

    fn tagged(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let lines = self.dump();
        let tagged = lines.iter().filter_map(|line| Some((line, tag(line)?)));
        tagged.filter(|(_, tag)| wanted(tag)).map(|(line, tag)| short(line, &tag)).collect()
    }

    /// The entries of the sets, sorted: `rfw4:drop:in:any 1.2.3.4`, each with its seconds left.
    pub fn entries(&self) -> Vec<(String, u64)> {
        let saved = self.ipset("save");
        let words = saved.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let left = |words: &[&str]| words.get(4).map_or(0, |seconds| seconds.parse().unwrap());
        let entry = |words: Vec<&str>| (format!("{} {}", words[1], words[2]), left(&words));
        let mut entries: Vec<_> = words.filter(|words| words[0] == "add").map(entry).collect();
        entries.sort();
        entries
    }

    /// The addresses that rfw blocks, by rules or in sets: `1.2.3.0/24`, `7.7.7.7`, each with its
    /// expiry. An address may occur only once.
    pub fn kept(&self) -> BTreeMap<String, Option<u64>> {
        let rules = self.rules().into_iter().filter(|rule| !rule.contains("--match-set"));
        let rules = rules.map(|rule| {
            let address = rule.split(' ').nth(2).unwrap();
            let time = rule.split(['[', ':', ']']).rev().nth(1).unwrap().parse().ok();
            (address.trim_end_matches("/32").trim_end_matches("/128").to_string(), time)
        });
        let time = |seconds| (seconds > 0).then(|| now() + seconds);
        let of_set = |line: &str| line.split_once(' ').unwrap().1.to_string();
        let sets = self.entries().into_iter().map(|(line, left)| (of_set(&line), time(left)));
        let mut kept = BTreeMap::new();
        for (address, expires) in rules.chain(sets) {
            assert!(kept.insert(address.clone(), expires).is_none(), "twice: {address}");
        }
        kept
    }

    /// `iptables -S` and `ip6tables -S` without the tagged lines.
    pub fn others(&self) -> Vec<String> {
        self.dump().into_iter().filter(|line| tag(line).is_none()).collect()
    }

    /// Whether rfw's rules precede all others, in every chain of both families.
    pub fn is_first(&self) -> bool {
        let chain =
            |listing: String| listing.lines().skip(1).map(|line| tag(line).is_none()).is_sorted();
        let chains = ["-S INPUT", "-S FORWARD", "-S OUTPUT"];
        chains.iter().all(|list| chain(self.iptables(list)) && chain(self.ip6tables(list)))
    }

    /// rfw's rules with their counters, `-c PACKETS BYTES`, if rules can be inserted with counters:
    /// ip6tables-nft 1.8.9 ignores them.
    pub fn counted(&self) -> Vec<String> {
        let listing = |family| {
            let iptables = format!("{} -w", self.real(family));
            let listing = sh(&format!(
                "{iptables} -N probe; {iptables} -A probe -c 3 3 -j RETURN; {iptables} -v -S
                 {iptables} -F probe; {iptables} -X probe"
            ));
            if listing.contains("-A probe -c 3 3 ") { listing } else { String::new() }
        };
        let both = listing("iptables") + &listing("ip6tables");
        both.lines().filter(|line| tag(line).is_some()).map(String::from).collect()
    }

    fn dump(&self) -> Vec<String> {
        let both = self.iptables("-S") + &self.ip6tables("-S");
        both.lines().map(String::from).collect()
    }

    /// Writes rfw.conf: the lines that every test needs, and `lines`.
    pub fn configure(&self, lines: &str) {
        let iptables = self.iptables_path();
        let always = format!("whitelist.file = white.list\niptables.path = {iptables}\n");
        self.write("rfw.conf", &format!("[config]\n{always}{lines}\n"));
    }

    /// Runs rfw until it exits; returns its exit status and both outputs.
    pub fn rfw(&self, arguments: &str) -> (i32, String) {
        let confined = self.confined();
        give_files(NOBODY);
        let mut command = Command::new("timeout");
        command.arg("10").args(confined.split_whitespace());
        if confined.is_empty() {
            command.arg(env!("CARGO_BIN_EXE_rfw"));
        }
        command.args(arguments.split(' '));
        let out = command.current_dir(&self.dir).output().unwrap();
        (out.status.code().expect("an exit status"), text(&out))
    }

    /// Starts rfw with these lines in rfw.conf and waits until it responds.
    pub fn start(&self, lines: &str) -> Rfw<'_> {
        self.configure(lines);
        let mut rfw = self.launch(&[]);
        rfw.await_ready();
        rfw
    }

    /// With `RFW_CONFINED` in the environment, rfw runs as contrib/rfw.service runs it, as far as that
    /// is possible without systemd: as an ordinary user with the capabilities of the unit.
    fn confined(&self) -> String {
        if !is_confined() {
            return String::new();
        }
        sh(&format!("cp --remove-destination {} /run/lab/rfw", env!("CARGO_BIN_EXE_rfw")));
        let sets =
            self.read("rfw.conf").contains("ipset.path") || !self.ipset("list -n").is_empty();
        let caps = if sets { "-all,+net_admin,+net_raw" } else { "-all,+net_admin" };
        let user = format!("--reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs");
        format!(
            "setpriv {user} --inh-caps {caps} --ambient-caps {caps} --bounding-set {caps} /run/lab/rfw"
        )
    }

    /// Starts rfw, perhaps by another program with its arguments, and does not wait.
    pub fn launch(&self, before: &[&str]) -> Rfw<'_> {
        let words = ["-f", "rfw.conf", "--logfile", "rfw.log", "--loglevel", "DEBUG"];
        // A test with another program is about something else, and runs as root.
        let confined = if before.is_empty() { self.confined() } else { String::new() };
        give_files(if before.is_empty() { NOBODY } else { 0 });
        let mut line = before.to_vec();
        match confined.split_whitespace().collect::<Vec<_>>()[..] {
            [] => line.push(env!("CARGO_BIN_EXE_rfw")),
            ref confined => line.extend(confined),
        }
        line.extend(words);
        let mut stderr = fs::File::options();
        let stderr = stderr.create(true).append(true).open(self.dir.join("stderr")).unwrap();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).current_dir(&self.dir).stdin(Stdio::null()).stderr(stderr);
        Rfw { child: command.spawn().unwrap(), lab: self }
    }
}

/// "rfw", "rfw:guard" or "rfw:1795431795" if the line is a rule of rfw.
fn tag(line: &str) -> Option<String> {
    let comment = line.split_once("--comment ")?.1.split(' ').next()?.trim_matches('"');
    let seconds = comment.strip_prefix("rfw:").unwrap_or("");
    let timed = !seconds.is_empty() && seconds.bytes().all(|b| b.is_ascii_digit());
    let plain = !line.contains(" -p ") && (comment == "rfw" || timed);
    (plain || comment == "rfw:guard").then(|| comment.into())
}

/// One spelling for all versions of iptables: the comment last, the default of REJECT omitted.
fn short(line: &str, tag: &str) -> String {
    let mut words = line.split(' ').skip(1);
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word {
            "-m" => drop(words.next()),
            "--comment" | "--reject-with" => drop(words.next()),
            _ => kept.push(word),
        }
    }
    format!("{} [{tag}]", kept.join(" "))
}

/// Another process that ends with the test.
pub struct Process(Child);

impl Process {
    pub fn start(words: &str) -> Process {
        let mut words = words.split(' ');
        let mut command = Command::new(words.next().unwrap());
        Process(command.args(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A running rfw; it is killed at the end of the test, and its output is shown if the test fails.
pub struct Rfw<'l> {
    child: Child,
    lab: &'l Lab,
}

impl Rfw<'_> {
    pub fn await_ready(&mut self) {
        let ended = self.await_start(10 + SLACK);
        assert_eq!(ended, None, "rfw ended: {}", self.lab.read("stderr"));
    }

    /// Waits until it responds (`None`) or exits (its exit status).
    pub fn await_start(&mut self, seconds: u64) -> Option<i32> {
        let mut ended = None;
        let conf = self.lab.read("rfw.conf");
        let is_local = conf.lines().any(|line| line == "local.server");
        await_true("rfw answers", seconds, || {
            ended = self.child.try_wait().unwrap();
            let local = || Conn::to(LOCAL).and_then(|mut conn| conn.try_ask("GET /", ""));
            ended.is_some()
                || is_local && local().is_ok()
                || !is_local && curl("-k", "GET /", "https://127.0.0.1:7393").ends_with("401")
        });
        ended.map(|status| status.code().expect("an exit status"))
    }

    /// Bytes in memory: `VmRSS`, now, or `VmHWM`, the most so far.
    pub fn memory(&self, key: &str) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(key)).expect(key);
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One for each connection, and those of `await_idle`.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }

    /// Waits until no connection is left; returns how many threads run then.
    pub fn await_idle(&self) -> usize {
        let listeners = sh("ss -Hltn").lines().count();
        let idle = 2 + 2 * listeners;
        await_true("main, the log's and two for each listener are left", 10 + SLACK, || {
            self.threads() == idle
        });
        idle
    }

    /// Waits until rfw has read all that it was sent and has nothing left to do, so that each request
    /// waits for its turn or for a program.
    pub fn await_queued(&self) {
        await_true("all is read, and all threads sleep", 10 + SLACK, || {
            let unread = sh("ss -Htn sport = :7390 | awk '{ sum += $2 } END { print sum + 0 }'");
            let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat"));
            let mut tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
            unread.trim() == "0"
                && tasks.all(|task| stat(task.unwrap()).is_ok_and(|stat| stat.contains(") S ")))
        });
    }

    /// kill -9
    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    pub fn restart(&mut self) {
        let ended = self.try_restart(10 + SLACK);
        assert_eq!(ended, None, "rfw ended: {}", self.lab.read("stderr"));
    }

    /// The same, as `await_start` has it.
    pub fn try_restart(&mut self, seconds: u64) -> Option<i32> {
        self.kill();
        self.child = self.lab.launch(&[]).into_child();
        self.await_start(seconds)
    }

    fn into_child(self) -> Child {
        let mut rfw = std::mem::ManuallyDrop::new(self);
        std::mem::replace(&mut rfw.child, Command::new("true").spawn().unwrap())
    }

    /// Waits until the process exits by itself; returns its exit status.
    pub fn await_end(&mut self, seconds: u64) -> Option<i32> {
        let mut ended = None;
        await_true("rfw ends", seconds, || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.and_then(|status| status.code())
    }

    /// Waits until the process dies by itself; returns the signal that killed it.
    pub fn signal(&mut self) -> Option<i32> {
        std::os::unix::process::ExitStatusExt::signal(&self.child.wait().unwrap())
    }
}

impl Drop for Rfw<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let ended = self.child.try_wait();
            let pid = self.pid();
            let processes = sh(&format!("ps -Lo stat,wchan:20,args -p {pid} --ppid {pid} || true"));
            let log = self.lab.read("rfw.log");
            let tail = log.lines().count().saturating_sub(40);
            let log: Vec<&str> = log.lines().skip(tail).collect();
            eprintln!("--- rfw ended: {ended:?}\n{processes}--- its log\n{}", log.join("\n"));
            eprintln!("--- its standard error\n{}", self.lab.read("stderr"));
            eprintln!("--- iptables -S\n{}", self.lab.dump().join("\n"));
        }
        self.kill();
    }
}

/// A response as received.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// "200 inserted", "409 whitelisted", "200".
    pub fn brief(&self) -> String {
        let word = [self.field("result"), self.field("error")].concat();
        format!("{} {word}", self.status).trim_end().into()
    }

    /// The response to a list: "inserted 3 whitelisted 1" with all counts but 0, or "400 bad_list 2 5"
    /// with the numbers of the invalid lines.
    pub fn sums(&self) -> String {
        let number = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
        if self.brief() != "200 applied" {
            let lines =
                self.body.split("\"line\":").skip(1).map(|line| " ".to_string() + &number(line));
            return self.brief() + &lines.collect::<String>();
        }
        let names = ["inserted", "refreshed", "exists", "deleted", "absent", "whitelisted_count"];
        let counts = names.map(|name| (name, self.field(name)));
        let counts = counts.iter().filter(|(_, count)| !["", "0"].contains(count));
        let words =
            counts.map(|(name, count)| format!("{} {count}", name.trim_end_matches("_count")));
        words.collect::<Vec<_>>().join(" ")
    }

    /// A member of the JSON object in the body, without its quotes.
    pub fn field(&self, name: &str) -> &str {
        let Some((_, value)) = self.body.split_once(&format!("\"{name}\":")) else {
            return "";
        };
        match value.strip_prefix('"') {
            Some(word) => word.split('"').next().unwrap_or(""),
            None => value.split([',', '}']).next().unwrap_or(""),
        }
    }

    pub fn expires(&self) -> u64 {
        self.field("expires").parse().expect("a time of expiry")
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
            .next()
    }
}

/// A persistent connection to the local server.
pub struct Conn(BufReader<TcpStream>);

impl Conn {
    pub fn open() -> Conn {
        Conn::to(LOCAL).unwrap()
    }

    pub fn to(address: &str) -> io::Result<Conn> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(40)))?;
        Ok(Conn(BufReader::new(stream)))
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        drop(self.0.get_mut().write_all(bytes.as_ref()));
    }

    pub fn writer(&self) -> TcpStream {
        self.0.get_ref().try_clone().unwrap()
    }

    /// `ask("PUT /drop/input/any/1.2.3.4")`
    pub fn ask(&mut self, request: &str) -> Answer {
        self.try_ask(request, "").expect(request)
    }

    /// The same with further header lines, each with its CRLF.
    pub fn try_ask(&mut self, request: &str, fields: &str) -> io::Result<Answer> {
        let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n");
        self.0.get_mut().write_all(head.as_bytes())?;
        self.answer()
    }

    /// `try_list("PUT /drop/input/any", "1.2.3.4\n")`: a request with a body.
    pub fn try_list(&mut self, request: &str, body: impl AsRef<[u8]>) -> io::Result<Answer> {
        self.send_list(request, body);
        self.answer()
    }

    pub fn send_list(&mut self, request: &str, body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        self.send(format!("{request} HTTP/1.1\r\nHost: localhost\r\n"));
        self.send(format!("Content-Length: {}\r\n\r\n", body.len()));
        self.send(body);
    }

    pub fn answer(&mut self) -> io::Result<Answer> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.0.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let status = head.get(9..12).and_then(|digits| digits.parse().ok());
        let status = status.ok_or(io::ErrorKind::InvalidData)?;
        let mut answer = Answer { status, head, body: String::new() };
        if status != 100 {
            answer.body = String::from_utf8(self.body(&answer)?).expect("UTF-8");
        }
        Ok(answer)
    }

    fn body(&mut self, answer: &Answer) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if let Some(length) = answer.header("Content-Length") {
            body.resize(length.parse().expect("a length"), 0);
            self.0.read_exact(&mut body)?;
        } else if answer.header("Transfer-Encoding") == Some("chunked") {
            while self.chunk(&mut body)? {}
        } else {
            self.0.read_to_end(&mut body)?;
        }
        Ok(body)
    }

    fn chunk(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        let mut size = String::new();
        self.0.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
        let mut chunk = vec![0; size + 2];
        self.0.read_exact(&mut chunk)?;
        body.extend(&chunk[..size]);
        Ok(size > 0)
    }

    /// Everything received until the server closes; after a refusal, there must be nothing.
    pub fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("still open"),
            _ => String::from_utf8_lossy(&rest).into(),
        }
    }
}

/// One request to the local server on a connection of its own.
pub fn ask(request: &str) -> Answer {
    Conn::open().ask(request)
}

/// A list to the local server on a connection of its own.
pub fn list(request: &str, body: impl AsRef<[u8]>) -> Answer {
    Conn::open().try_list(request, body).expect(request)
}

/// One request over HTTP by curl, with further options; returns the body and, after it, the status.
pub fn curl(options: &str, request: &str, server: &str) -> String {
    let (method, path) = request.split_once(' ').expect("METHOD /path");
    let words = format!("-sS -m 30 -g -w %{{http_code}} {options} -X {method} {server}{path}");
    text(&Command::new("curl").args(words.split_whitespace()).output().expect("curl is needed"))
}

/// Compares the rows of a table, and shows all that differ at once.
pub fn table<W: AsRef<str>>(rows: &[(&str, W)], mut got: impl FnMut(&str) -> String) {
    let mut wrong = String::new();
    for (given, want) in rows {
        let (got, want) = (got(given), want.as_ref());
        if got != want {
            wrong += &format!("{given:?}\n    is     {got}\n    not    {want}\n");
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

/// Sends requests to the local server, in this order, and compares the short form of the responses.
pub fn transcript(rows: &[(&str, &str)]) {
    table(rows, |request| ask(request).brief());
}

pub fn await_true(what: &str, seconds: u64, probe: impl FnMut() -> bool) {
    await_within(what, |_| Duration::from_secs(seconds), probe);
}

/// Waits for the outcome of rfw's next check of the kernel; `probe` lists the rules, too. rfw pauses for
/// at least as long as a check takes, checks, and repairs; the longest probe shows how long each of
/// these is while the machine is busy.
pub fn await_repair(what: &str, seconds: u64, probe: impl FnMut() -> bool) {
    await_within(what, |longest| Duration::from_secs(seconds) + 3 * longest, probe);
}

/// The limit depends on the time that the longest probe has taken.
fn await_within(what: &str, limit: impl Fn(Duration) -> Duration, mut probe: impl FnMut() -> bool) {
    let (begun, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        let from = Instant::now();
        if probe() {
            return;
        }
        longest = longest.max(from.elapsed());
        let limit = limit(longest);
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the wall clock shows `time`: for events that must not have happened by then.
pub fn await_time(time: u64) {
    await_true("time passes", 60, || now() >= time);
}

pub fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

/// Runs a shell script that must succeed; its standard output.
pub fn sh(script: &str) -> String {
    let mut command = Command::new("/bin/sh");
    command.args(["-ec", script]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/run");
    let out = command.output().unwrap();
    assert!(out.status.success(), "{script}\n{}", text(&out));
    String::from_utf8(out.stdout).unwrap()
}

pub fn text(out: &Output) -> String {
    [&out.stdout, &out.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}
