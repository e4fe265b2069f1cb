//! A log that blocks, fails or is flooded stops nothing, and reports how many lines are missing.

use crate::lab::*;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread;

/// `2026-11-22T11:03:15.123Z INFO ...`
fn is_whole(line: &str) -> bool {
    let stamp = line.replace(|c: char| c.is_ascii_digit(), "9");
    let level =
        [" DEBUG ", " INFO ", " WARNING "].iter().any(|level| stamp[24..].starts_with(level));
    stamp.starts_with("9999-99-99T99:99:99.999Z") && level
}

/// Sends this many pipelined requests, with further header lines; returns how many got `status`.
fn pipeline(request: &str, fields: &str, count: usize, status: &str) -> usize {
    let mut conn = Conn::open();
    let (head, mut writer) =
        (format!("{request} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n"), conn.writer());
    let sender =
        thread::spawn(move || (0..count).try_for_each(|_| writer.write_all(head.as_bytes())));
    let answers = (0..count).map_while(|_| conn.answer().ok());
    let got = answers.filter(|answer| answer.brief() == status).count();
    drop(sender.join());
    got
}

/// After 830 PUTs each got 503, because the log was written under the Mutex.
#[test]
fn a_log_that_blocks() {
    once(|lab| {
        // Standard error and a log file; the pipe is open for reading, too.
        for logfile in ["- 2<>pipe", "pipe"] {
            sh("rm -f lab/pipe; mkfifo lab/pipe");
            lab.configure("local.server");
            let run = format!("exec \"$0\" -f rfw.conf --loglevel DEBUG --logfile {logfile}");
            let mut rfw = lab.launch(&["/bin/sh", "-c", &run]);
            rfw.await_ready();
            assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 inserted");
            assert_eq!(pipeline("PUT /drop/input/any/1.2.3.4", "", 1_999, "200 exists"), 1_999);
            assert_eq!(pipeline("GET /metrics", "", 5_000, "200"), 5_000);
            assert_eq!(ask("DELETE /drop/input/any/1.2.3.4").brief(), "200 deleted");

            let reader = BufReader::new(
                File::options().read(true).write(true).open("/run/lab/pipe").unwrap(),
            );
            let mut lines = reader.lines().map(Result::unwrap);
            let report = "WARNING the log blocked or failed; lines lost: ";
            let (mut puts, mut gets) = (0, 0);
            let lost = lines.by_ref().find_map(|line| {
                assert!(is_whole(&line), "{line}");
                puts += usize::from(line.contains("PUT /drop"));
                gets += usize::from(line.contains("GET /metrics"));
                Some(line.split_once(report)?.1.parse::<usize>().unwrap())
            });
            // The DELETE's line is lost, too.
            assert_eq!((puts, gets + lost.unwrap()), (2_000, 5_001), "{logfile}: {lost:?}");
            ask("PUT /drop/input/any/1.2.3.5");
            assert!(lines.any(|line| line.contains("PUT /drop/input/any/1.2.3.5")));
        }
    });
}

/// In 0.3, half a line remained, and the next one followed it.
#[test]
fn a_line_is_written_whole_or_not_at_all() {
    once(|lab| {
        sh("mkdir lab/disk; mount -t tmpfs -o size=64k disk lab/disk");
        sh("ln -s disk/rfw.log lab/rfw.log");
        let _rfw = lab.start("local.server");
        lab.log();
        sh("cat /dev/zero > lab/disk/full || true");
        // The rest of the log's page has no room for these.
        assert_eq!(pipeline("GET /metrics", "", 200, "200"), 200);
        let full = lab.read("rfw.log");
        assert!(full.ends_with('\n') && full.lines().all(is_whole), "{full}");
        assert!(full.matches("GET /metrics").count() < 200, "the disk is full");
        sh("rm lab/disk/full");
        let log = lab.log();
        assert!(log.starts_with(&full) && log.lines().all(is_whole), "{log}");
        assert_eq!(log.matches("GET /metrics").count(), 200, "all were in the queue");
    });
}

/// 20,000 refusals wrote 1.9 MB; four connections wrote 6 MB/s.
#[test]
fn a_log_that_floods() {
    once(|lab| {
        let keys = "local.server.authentication\nauth.username = mu\nauth.password = secret";
        let _rfw = lab.start(&format!("local.server\n{keys}"));
        let flood = || pipeline("PUT /drop/input/any/1.2.3.4", "", 5_000, "401 unauthorized");
        let floods: Vec<_> = (0..4).map(|_| thread::spawn(flood)).collect();
        assert_eq!(floods.into_iter().map(|flood| flood.join().unwrap()).sum::<usize>(), 20_000);
        // Changes are still logged, and so are refusals to another address.
        let mine = "Authorization: Basic bXU6c2VjcmV0\r\n";
        let delete = "DELETE /drop/input/any/1.2.3.4";
        assert_eq!(pipeline(delete, mine, 200, "200 absent"), 200);
        sh("curl -sg -X PUT http://[::1]:7390/drop/input/any/1.2.3.4");
        let log = || lab.read("rfw.log");
        await_true("all changes are logged", SLACK, || log().matches("\" absent ").count() == 200);
        // The first ones are those of `await_ready`.
        let first = log().matches("\"GET /\" 401 unauthorized ").count();
        let refused = || log().matches(" INFO 127.0.0.1 - \"").count();
        assert_eq!(refused(), 100);
        await_true("the other address", SLACK, || log().contains("INFO ::1 - \"PUT /drop"));
        let report =
            format!(" INFO 127.0.0.1: {} more requests refused within a minute\n", 19_900 + first);
        await_true("the count", 61 + SLACK, || log().contains(&report));
        assert!(!log().contains("::1: "), "nothing was left out");
        ask("PUT /drop/input/any/1.2.3.4");
        await_true("another minute", SLACK, || refused() == 101);
    });
}

/// Each interface that does not exist counted as a refusal: the log claimed refusals of changes that were
/// made, and lacked real ones.
#[test]
fn a_change_with_a_note_is_no_refusal() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        assert_eq!(pipeline("PUT /drop/input/eth0/1.2.3.4", "", 150, "200 exists"), 149);
        ask("PUT /drop/input/any/1.2.3");
        let log = || lab.read("rfw.log");
        await_true("the refusal", SLACK, || log().contains("\"PUT /drop/input/any/1.2.3\" 400 "));
        assert_eq!(log().matches(" WARNING 127.0.0.1 -: At present no interface").count(), 150);
    });
}

/// In 0.3, they were by PUT, but not by GET.
#[test]
fn password_guesses_are_logged_whatever_the_method() {
    once(|lab| {
        let keys = "local.server.authentication\nauth.username = mu\nauth.password = secret";
        lab.configure(&format!("local.server\n{keys}"));
        let run = "exec \"$0\" -f rfw.conf --logfile rfw.log";
        let mut rfw = lab.launch(&["/bin/sh", "-c", run]);
        rfw.await_ready();
        let guess = || Conn::open().try_ask("GET /list", "Authorization: Basic eA==\r\n").unwrap();
        let statuses: Vec<_> = (0..12).map(|_| guess().status).collect();
        assert_eq!((statuses[0], statuses[11]), (401, 429));
        let log = || lab.read("rfw.log");
        await_true("a line", SLACK, || log().contains(" INFO 127.0.0.1 - \"GET /list\" 429 "));
    });
}

/// A PUT that was not a valid request, such as one of an address in brackets, left no line at INFO.
#[test]
fn a_request_that_cannot_be_parsed_is_logged() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let long = format!("PUT /{}", "x".repeat(9_000));
        for request in ["PUT /drop/input/any/[2001:db8::1]", &long] {
            let status = curl("-o /dev/null", request, "http://127.0.0.1:7390");
            await_true(&status, SLACK, || {
                lab.read("rfw.log").contains(&format!(" INFO 127.0.0.1 - \"-\" {status} "))
            });
        }
    });
}

#[test]
fn lines_logged_before_a_failed_start_are_written() {
    once(|lab| {
        lab.stand_in("");
        sh("rm lab/bin/ip6*");
        let _busy = TcpListener::bind(LOCAL).unwrap();
        lab.configure("local.server");
        for _ in 0..20 {
            lab.write("rfw.log", "");
            let (status, said) = lab.rfw("-f rfw.conf --logfile rfw.log -v");
            let (warning, error) = ("IPv6 rules are not accepted", "rfw: cannot listen");
            let order = said.find(warning).zip(said.find(error)).is_some_and(|(a, b)| a < b);
            assert!(status == 1 && order, "{status} {said}");
            assert!(lab.read("rfw.log").contains(warning));
        }
        // It exits although the log blocks.
        sh("chown root lab/* rfw");
        let script = "mkfifo pipe; exec 3<>pipe; dd if=/dev/zero bs=64k count=1 >&3 2>err
            exec timeout 10 \"$0\" -f rfw.conf --logfile pipe 2>err";
        let mut run = Command::new("/bin/sh");
        run.args(["-c", script, env!("CARGO_BIN_EXE_rfw")]).current_dir(&lab.dir);
        assert_eq!(run.status().unwrap().code(), Some(1), "{}", lab.read("err"));
        assert!(lab.read("err").starts_with("rfw: cannot listen"), "{}", lab.read("err"));
    });
}

/// As logrotate does it (contrib/logrotate), under a running rfw.
#[test]
fn copytruncate() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        assert_eq!(pipeline("GET /metrics", "", 100, "200"), 100);
        lab.log();
        sh("cd lab; cp rfw.log rfw.log.1; : > rfw.log");
        assert_eq!(pipeline("GET /metrics", "", 100, "200"), 100);
        let (old, new) = (lab.read("rfw.log.1"), lab.log());
        for log in [&old, &new] {
            assert!(log.matches("\"GET /metrics\"").count() >= 100);
            assert!(log.lines().all(is_whole), "{log}");
        }
    });
}
