//! SPEC 7: a log that blocks, fails or is flooded stops nothing, and says what is missing.

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

/// Sends so many requests one behind the other, with further header lines; how many got `status`.
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
            // The DELETE's line is lost as well.
            assert_eq!((puts, gets + lost.unwrap()), (2_000, 5_001), "{logfile}: {lost:?}");
            ask("PUT /drop/input/any/1.2.3.5");
            assert!(lines.any(|line| line.contains("PUT /drop/input/any/1.2.3.5")));
        }
    });
}

/// Half a line remained, and the next one followed it.
#[test]
fn a_line_is_written_whole_or_not_at_all() {
    once(|lab| {
        sh("mkdir lab/disk; mount -t tmpfs -o size=64k disk lab/disk");
        sh("ln -s disk/rfw.log lab/rfw.log");
        let _rfw = lab.start("local.server");
        lab.log();
        sh("cat /dev/zero > lab/disk/full || true");
        // What is left of the log's page has no room for these.
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

#[test]
fn what_was_logged_before_a_failed_start_is_written() {
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
        // It ends, though the log takes nothing.
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
