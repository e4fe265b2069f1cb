//! One instance per network namespace, and a program that cannot even be killed. Programs that hang,
//! flood their output or are killed are in `commits` and `faults`.

use crate::lab::*;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rfw");

/// A user other than root and the user of a confined rfw.
const STRANGER: &str = "4321";

/// rfw 0.3 bound the abstract socket `@rfw`, which is open to all in the network namespace.
#[test]
fn an_instance_lock_that_any_user_could_take() {
    once(|lab| {
        let name = SocketAddr::from_abstract_name("rfw").unwrap();
        let _socket = UnixDatagram::bind_addr(&name).unwrap();
        let _rfw = lab.start("local.server");
        if has_users("process::an_instance_lock_that_any_user_could_take") {
            let stranger = format!("setpriv --reuid {STRANGER} --regid {STRANGER} --clear-groups");
            let said = sh(&format!("{stranger} flock -n /run/rfw/net-* true 2>&1 || true"));
            assert!(said.contains("Permission denied"), "{said}");
        }
    });
}

#[test]
fn a_second_rfw_waits_and_says_so() {
    once(|lab| {
        let mut first = lab.start("local.server");
        let waits = || lab.read("rfw.log").contains(" WARNING another rfw");
        let from = Instant::now();
        let mut second = lab.launch(&[]);
        await_true("it says that it waits", SLACK, waits);
        assert_eq!(second.await_end(15 + SLACK), Some(1));
        assert!(from.elapsed() >= Duration::from_secs(15), "{:?}", from.elapsed());
        let said = lab.read("stderr");
        assert!(said.contains("stop it first (fuser -v /run/rfw/net-"), "{said}");
        lab.clear_log();
        let mut second = lab.launch(&[]);
        await_true("it says that it waits", SLACK, waits);
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 inserted");
        first.kill();
        second.await_ready();
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 exists");
    });
}

/// The second one got the lock of the first, which was killed, while the kernel had not yet closed its
/// sockets: "Address already in use".
#[test]
fn a_port_that_was_about_to_be_free_ended_the_start() {
    if !has_strace("process::a_port_that_was_about_to_be_free_ended_the_start") {
        return;
    }
    once(|lab| {
        let port = TcpListener::bind(LOCAL).unwrap();
        lab.configure("local.server");
        let mut rfw = lab.launch(&["strace", "-D", "-qq", "-o", "trace", "-e", "trace=bind"]);
        await_true("rfw has tried", 10 + SLACK, || lab.read("trace").contains("EADDRINUSE"));
        drop(port);
        rfw.await_ready();
    });
}

#[test]
fn network_namespaces_that_share_run_have_one_rfw_each() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        // Including the directory of a confined one.
        let run = format!(
            "chown -R root /run/rfw /run/lab; exec {PROGRAM} -f /run/lab/rfw.conf --logfile /run/lab/other.log"
        );
        lab.write("other", &format!("ip link set lo up; {run}"));
        let _other = Process::start("unshare -n /bin/sh /run/lab/other");
        let log = || lab.read("other.log");
        await_true("the other one serves", 10 + SLACK, || log().contains("http://127.0.0.1:7390"));
        assert!(!log().contains("waiting"), "{}", log());
    });
}

/// How /run/rfw is made unsafe, and rfw's message.
const BAD_FOLDERS: [(&str, &str, &str); 6] = [
    ("mkdir -m 755 rfw", "", "other users can enter it (owner 0, mode 755)"),
    ("install -d -m 700 -o 4321 rfw", "", "other users can enter it (owner 4321, mode 700)"),
    ("mkdir -m 700 rfw", "AS_USER", "Permission denied"),
    ("true", "AS_USER", "Permission denied"),
    ("mount -o remount,bind,ro /run", "", "Read-only file system"),
    ("ln -s private/rfw rfw", "", "remove it, if it is a link that a stopped unit left; "),
];

#[test]
fn a_lock_directory_that_is_not_safe() {
    once(|lab| {
        lab.configure("local.server");
        sh(&format!("cp {PROGRAM} lab/rfw; chmod 755 lab"));
        let as_user = "setpriv --reuid 4321 --inh-caps +net_admin --ambient-caps +net_admin";
        let has_users = has_users("process::a_lock_directory_that_is_not_safe");
        for (wrong, before, word) in BAD_FOLDERS {
            if !has_users && (wrong.contains(STRANGER) || !before.is_empty()) {
                continue;
            }
            // rfw reads only files of its own user or root, and only their owner can read these.
            let owner = if before.is_empty() { 0 } else { 4321 };
            let before = before.replace("AS_USER", as_user);
            let run = format!("timeout 10 {before} lab/rfw -f lab/rfw.conf --logfile - 2>&1");
            // The mount is in its own mount namespace; the rest is removed below.
            let said = sh(&format!(
                "chown {owner} lab/*; unshare -m /bin/sh -c '{wrong}; {run} || echo $?'"
            ));
            for word in [word, "/run/rfw", "install -d -m 700 -o USER /run/rfw", "\n1\n"] {
                assert!(said.contains(word), "{wrong}: {word}: {said}");
            }
            sh("rm -rf rfw");
        }
        // The fix that the message proposes.
        if has_users {
            sh("install -d -m 700 -o 4321 rfw; chown 4321 lab/*");
            let run = format!("{as_user} /run/lab/rfw -f /run/lab/rfw.conf --logfile -");
            let _rfw = Process::start(&run);
            await_true("it serves", 10 + SLACK, || Conn::to(LOCAL).is_ok());
        }
    });
}

/// A child held by its tracer: like one in uninterruptible sleep, it does not die of SIGKILL.
const HELD: &str = r#"exec /usr/bin/strace -D -o /dev/null -e trace=none /bin/sh -c '
    while read -r key value; do
        [ "$key" != TracerPid: ] || tracer=$value
    done < /proc/$$/status
    echo $$ > /run/lab/child.new; echo $tracer > /run/lab/tracer
    /bin/mv /run/lab/child.new /run/lab/child
    kill -STOP $tracer; exec /bin/sleep 100'"#;

/// rfw 0.3 waited for it, with the Mutex locked.
#[test]
fn a_child_that_cannot_be_killed() {
    if !has_strace("process::a_child_that_cannot_be_killed") {
        return;
    }
    once(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        lab.stand_in_for_changes(HELD);
        let from = Instant::now();
        let answer = ask("PUT /drop/input/any/1.2.3.4");
        let took = from.elapsed();
        let pid = lab.read("child").trim().to_string();
        let child = Path::new("/proc").join(&pid);
        assert!(child.exists(), "it was killed");
        lab.stand_in("");
        assert_eq!(answer.brief(), "503 busy");
        let says = format!("cannot be killed (process {pid})");
        assert!(answer.body.contains(&says), "{}", answer.body);
        await_true("it is logged", SLACK, || lab.read("rfw.log").contains(&says));
        assert!(took < Duration::from_secs(11 + SLACK), "{took:?}");
        let works = || ask("PUT /drop/input/any/1.2.3.4").status == 200;
        await_true("rfw works on", SLACK, works);
        assert!(child.exists(), "it was killed");
        sh("kill -KILL $(cat lab/tracer)");
        await_true("the next check reaps it", 12 + SLACK, || !child.exists());
    });
}
