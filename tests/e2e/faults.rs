//! Failures around rfw: system calls, descriptors, the disk, the clock, iptables, its lock. Each
//! time, it stays alive, answers 5xx in time, leaves no rule without its expiry, and works again at
//! once with as many descriptors and threads as before.
//!
//! Elsewhere: iptables that exits 4, floods its standard error, hangs or is killed
//! (`kernel::an_iptables_that_fails`), that cannot be started
//! (`kernel::an_iptables_that_cannot_be_started_or_read`), a lock held longer than rfw waits
//! (`kernel::a_held_xtables_lock_gives_503`), a clock set by decades
//! (`kernel::a_jump_of_the_clock_expires_nothing_early_or_late`), a log on /dev/full
//! (`program::loglevel_and_standard_error`), kill -9 at any moment (`crash`).

use crate::kernel::CLOCK;
use crate::lab::*;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

const PUT: &str = "PUT /drop/input/any/1.2.3.4?expire=1h";
const HEAD: &str = " HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Descriptors and threads: a constant number when idle; a check of the kernel, each second, needs
/// some more while its programs run.
pub fn held(rfw: &Rfw) -> (usize, usize) {
    let runs_program = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", rfw.pid())).unwrap();
        let children = |task: fs::DirEntry| fs::read_to_string(task.path().join("children"));
        tasks.into_iter().any(|task| children(task.unwrap()).is_ok_and(|text| !text.is_empty()))
    };
    let files = || {
        await_true("no program runs", 2 + SLACK, || !runs_program());
        thread::sleep(Duration::from_millis(20));
        fs::read_dir(format!("/proc/{}/fd", rfw.pid())).unwrap().count()
    };
    ((0..10).map(|_| files()).min().unwrap(), rfw.threads())
}

/// rfw is alive, works at once, has released everything, and each rule has its expiry.
fn unharmed(lab: &Lab, rfw: &Rfw, before: (usize, usize), what: &str) {
    let from = Instant::now();
    assert_eq!(ask(PUT).status, 200, "{what}");
    assert_eq!(ask("GET /list").body.matches("source").count(), 1, "{what}");
    assert!(from.elapsed() < Duration::from_secs(1 + SLACK), "{what}: {:?}", from.elapsed());
    let rules = lab.rules();
    assert!(rules.len() == 1 && rules[0].contains("[rfw:"), "{what}: {rules:?}");
    assert_eq!(ask("DELETE /drop/input/any/1.2.3.4").status, 200, "{what}");
    await_true(what, 2 + SLACK, || held(rfw) == before);
}

/// Makes system calls fail until the result is dropped.
pub fn inject(rfw: &Rfw, fault: &str) -> Process {
    trace(rfw, &format!("-o /dev/null -e inject={fault}"))
}

/// Traces rfw and the programs that it starts until the result is dropped.
pub fn trace(rfw: &Rfw, options: &str) -> Process {
    let pid = rfw.pid();
    let tracer = Process::start(&format!("strace -f -qq -p {pid} {options}"));
    await_true("strace traces all threads", 10, || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let status = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("status"));
        let mut all = threads.map(|thread| status(thread.unwrap()).unwrap_or_default());
        all.all(|status| !status.contains("TracerPid:\t0\n"))
    });
    tracer
}

/// The responses on an open and on a new connection meanwhile; "" is none or a closed connection.
const FAULTS: [(&str, &str, &str); 12] = [
    ("execve:error=ENOENT", "503 busy", "503 busy"),
    ("execve:error=ENOMEM", "503 busy", "503 busy"),
    ("execve:error=EMFILE", "503 busy", "503 busy"),
    ("clone,clone3,fork,vfork:error=EAGAIN", "503 busy", ""), // no thread either
    ("clone,clone3,fork,vfork:error=ENOMEM", "503 busy", ""),
    ("socketpair:error=EMFILE", "503 busy", "503 busy"),
    ("accept4:error=EMFILE", "200 inserted", "waits"),
    ("accept4:error=ECONNABORTED", "200 inserted", "waits"),
    ("accept4:error=ENOBUFS", "200 inserted", "waits"),
    ("sendto:error=EPIPE", "", ""),
    // On an open connection, the call may have begun earlier: then the programs cannot be read.
    ("recvfrom:error=ECONNRESET", "|503 busy", ""),
    // The log, and the programs' output: rfw cannot see that the rule exists.
    ("write:error=ENOSPC", "200 inserted", "200 exists|500 iptables_failed|503 busy"),
];

/// Seconds in which rfw checks the kernel several times, while system calls fail in iptables, too.
const CHECKS: u64 = 4;

#[test]
fn system_calls_that_fail() {
    if !has_strace("faults::system_calls_that_fail") {
        return;
    }
    both(|lab| {
        let rfw = lab.start("local.server");
        rfw.await_idle();
        let before = held(&rfw);
        for (fault, kept_gets, new_gets) in FAULTS {
            let mut kept = Conn::open();
            assert_eq!(kept.ask("GET /").status, 200);
            let tracer = inject(&rfw, fault);
            let from = Instant::now();
            let brief = |answer: std::io::Result<Answer>| answer.map_or("".into(), |a| a.brief());
            let got = brief(kept.try_ask(&PUT.replace("=1h", "=9h"), ""));
            assert!(kept_gets.split('|').any(|want| want == got), "{fault}: {got}");
            let mut new = Conn::open();
            new.send(format!("{}{HEAD}", PUT.replace("?expire=1h", "")));
            if new_gets != "waits" {
                let got = brief(new.answer()).replace("refreshed", "exists");
                assert!(new_gets.split('|').any(|want| want == got), "{fault}: {got}");
            }
            let took = from.elapsed();
            assert!(took < Duration::from_secs(10 + SLACK), "{fault}: {took:?}");
            await_time(now() + CHECKS);
            drop(tracer);
            if new_gets == "waits" {
                assert_eq!(brief(new.answer()), "200 refreshed", "{fault}");
            }
            drop((kept, new));
            unharmed(lab, &rfw, before, fault);
        }
    });
}

/// The first threads and programs that rfw cannot start, each in turn: it panicked.
#[test]
fn a_start_without_a_thread_or_program() {
    if !has_strace("faults::a_start_without_a_thread_or_program") {
        return;
    }
    once(|lab| {
        lab.configure("local.server");
        for number in 1.. {
            let fault = format!("inject=clone,clone3,fork,vfork:error=EAGAIN:when={number}");
            // Only the main thread is traced, and rfw is the child, not strace.
            let mut rfw = lab.launch(&["strace", "-D", "-qq", "-o", "trace", "-e", &fault]);
            let ended = rfw.await_start(10 + SLACK);
            let said = lab.read("stderr");
            assert!(
                matches!(ended, None | Some(1)) && !said.contains("panicked"),
                "{fault}: {said}"
            );
            rfw.kill();
            if !lab.read("trace").contains("(INJECTED)") {
                assert!(number > 9, "{number}");
                break; // each has failed once
            }
        }
    });
}

#[test]
fn no_descriptors_left() {
    both(|lab| {
        lab.configure("local.server");
        let mut rfw = lab.launch(&["env"]); // never confined: prlimit may not touch that one
        rfw.await_ready();
        rfw.await_idle();
        let before = held(&rfw);
        let pid = rfw.pid();
        let soft = sh(&format!("prlimit -p {pid} -n -o SOFT --noheadings"));
        for more in 0..8 {
            let what = format!("{more} descriptors more");
            let mut kept = Conn::open();
            assert_eq!(kept.ask("GET /").status, 200);
            let open = held(&rfw).0 + more;
            sh(&format!("prlimit -p {pid} --nofile={open}:"));
            let answer = kept.ask(PUT);
            assert!([200, 503].contains(&answer.status), "{what}: {answer:?}");
            let mut new = Conn::open();
            new.send(format!("{PUT}{HEAD}"));
            thread::sleep(Duration::from_millis(300)); // it tries to accept
            sh(&format!("prlimit -p {pid} --nofile={}:", soft.trim()));
            let answer = new.answer();
            let answered = answer.as_ref().is_ok_and(|a| [200, 503].contains(&a.status));
            assert!(answered || answer.is_err(), "{what}: {answer:?}");
            drop((kept, new));
            unharmed(lab, &rfw, before, &what);
        }
    });
}

#[test]
fn a_log_on_a_full_disk() {
    once(|lab| {
        sh("mkdir lab/disk; mount -t tmpfs -o size=64k disk lab/disk");
        sh("ln -s disk/rfw.log lab/rfw.log; cat /dev/zero > lab/disk/full || true");
        let rfw = lab.start("local.server");
        rfw.await_idle();
        unharmed(lab, &rfw, held(&rfw), "a full disk");
        sh("rm lab/disk/full");
        ask(PUT);
        await_true("it logs again", SLACK, || lab.read("rfw.log").contains("1.2.3.4"));
    });
}

#[test]
fn a_clock_that_jumps_an_hour() {
    both(|lab| {
        lab.write("clock.c", CLOCK);
        sh("cd lab; cc -shared -fPIC -w -o clock.so clock.c");
        lab.write("jump", "0");
        lab.configure("local.server");
        let mut rfw = lab.launch(&["env", "LD_PRELOAD=/run/lab/clock.so"]);
        rfw.await_ready();
        for jump in ["3600", "0", "-3600"] {
            let from = Instant::now();
            ask("PUT /drop/input/any/1.2.3.4?expire=4");
            lab.write("jump", jump);
            await_true("it expires", 6 + SLACK, || lab.rules().is_empty());
            assert!(from.elapsed() >= Duration::from_secs(3), "early: {jump}");
        }
    });
}

/// A program leaves a child behind that holds its end of the sockets.
#[test]
fn an_iptables_that_leaves_a_grandchild() {
    both(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        rfw.await_idle();
        let before = held(&rfw);
        lab.stand_in("/bin/sleep 20 & $real \"$@\"; exit $?");
        unharmed(lab, &rfw, before, "while they stay");
        lab.stand_in("");
        unharmed(lab, &rfw, before, "afterwards");
    });
}

/// As by Ctrl-Z and fg, a debugger, or a paused container.
#[test]
fn stopped_and_continued() {
    both(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        let mut kept = Conn::open();
        let mut half = Conn::open();
        assert_eq!(kept.ask("GET /").status, 200);
        half.send(&PUT[..9]);
        let pause = || sh(&format!("kill -STOP {0}; sleep 0.2; kill -CONT {0}", rfw.pid()));
        pause();
        lab.stand_in_for_changes("/bin/touch $lab/begun; /bin/sleep 1");
        kept.send(format!("{PUT}{HEAD}"));
        await_true("iptables has begun", SLACK, || lab.dir.join("begun").exists());
        pause();
        assert_eq!(kept.answer().unwrap().brief(), "200 inserted");
        half.send(format!("{}{HEAD}", &PUT[9..]));
        assert_eq!(half.answer().unwrap().status, 200);
    });
}

/// Endless listings of rfw's own rules, of none of them, and of one endless line.
#[test]
fn an_iptables_that_floods_its_output() {
    once(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        rfw.await_idle();
        let before = held(&rfw);
        for what in [
            "/usr/bin/yes noise",
            "/bin/cat /dev/zero",
            "/usr/bin/yes -- -A INPUT -s 9.9.9.9/32 -m comment --comment rfw -j DROP",
        ] {
            let begin = "for chain in INPUT FORWARD OUTPUT; do echo \"-P $chain ACCEPT\"; done";
            lab.stand_in(&format!("case \" $* \" in *\" -S \"*) {begin}; exec {what};; esac"));
            let from = Instant::now();
            let answer = ask("GET /list");
            let took = from.elapsed();
            assert!(answer.status >= 500, "{what}: {}", answer.status);
            assert!(took < Duration::from_secs(21 + SLACK), "{what}: {took:?}");
            let peak = rfw.memory("VmHWM");
            assert!(peak < 64 << 20, "{what}: {peak}");
            lab.stand_in("");
            await_true(what, 10 + SLACK, || ask(PUT).status == 200);
            unharmed(lab, &rfw, before, what);
        }
    });
}

#[test]
fn the_xtables_lock_held_for_five_seconds() {
    legacy(|lab| {
        let rfw = lab.start("local.server");
        rfw.await_idle();
        let before = held(&rfw);
        let holder = Process::start("flock -F /run/xtables.lock sleep 5");
        let held_by = || sh("flock -n /run/xtables.lock true && echo free || echo held");
        await_true("the lock is held", SLACK, || held_by() == "held\n");
        let from = Instant::now();
        thread::scope(|scope| {
            for n in 1..=4 {
                scope.spawn(move || {
                    let status = ask(&format!("PUT /drop/input/any/10.0.0.{n}?expire=1h")).status;
                    assert!([200, 503].contains(&status), "{status}");
                });
            }
        });
        assert!(from.elapsed() < Duration::from_secs(10 + SLACK), "{:?}", from.elapsed());
        await_true("the lock is free", SLACK, || held_by() == "free\n");
        drop(holder);
        let rules = lab.rules();
        assert!(rules.iter().all(|rule| rule.contains("[rfw:")), "{rules:?}");
        (1..=4).for_each(|n| drop(ask(&format!("DELETE /drop/input/any/10.0.0.{n}"))));
        unharmed(lab, &rfw, before, "the lock");
    });
}
