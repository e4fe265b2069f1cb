//! Changes that hang, fail halfway, or fail after they are made: every response is true, and the
//! kernel, GET /list and the state file agree. Each defect of rfw 0.3 that must not return has a test
//! named after it; those of listings and of other programs are in `repair`.

use crate::faults::trace;
use crate::lab::*;
use crate::repair::{FORMS, Form, READS, enforced, in_forms, listed, metric, of_form};
use crate::sets::spoil;
use crate::tls;
use std::thread;
use std::time::{Duration, Instant};

/// How long rfw may take to repair everything once its tools work: it checks the kernel at least
/// every ten seconds.
const RECOVERY: u64 = 12 + SLACK;

/// No batch takes longer, whatever its content.
const LONGEST: u64 = 30;

/// The next restore of a program first runs the script `next-PROGRAM`, once, if it exists.
const NEXT: &str = r#"case "$me $*" in *restore*)
    /bin/mv $lab/next-$me $lab/next.$$ 2> /dev/null && . $lab/next.$$
esac"#;

fn addresses(count: usize) -> String {
    let line =
        |n| format!("10.{}.{}.{}\n2001:db8::{n:x}\n", n / 62_500, n / 250 % 250, n % 250 + 1);
    (0..count).map(line).collect()
}

/// Runs a batch whose restore of one family hangs, perhaps after a slow one of the other family.
fn hung_batch(lab: &Lab, form: Form, faults: &[(&str, &str)]) {
    let count = 5_000;
    let lines = addresses(count);
    lab.stand_in(NEXT);
    let due = "/drop/forward/any/1.1.1.1/any/2.2.2.2";
    let due_is_there = || lab.iptables("-S FORWARD").contains("-s 1.1.1.1/32 -d 2.2.2.2/32");
    for (program, fault) in faults {
        let what = format!("{form:?} {program}: {fault}");
        let mut rfw = lab.start(&format!("local.server\n{}", of_form(form)));
        assert_eq!(list("PUT /drop/input/any", "3.3.3.3\n3::3\n").sums(), "inserted 2");
        assert_eq!(ask(&format!("PUT {due}?expire=4")).brief(), "200 inserted");
        let file = format!("next-{program}");
        lab.write_data(&file, fault);
        let from = Instant::now();
        let in_time = |what: &str, seconds: u64| {
            let took = from.elapsed();
            assert!(took < Duration::from_secs(seconds + SLACK), "{what}: {took:?}");
        };
        thread::scope(|scope| {
            let batch = scope.spawn(|| {
                let answer = list("PUT /drop/input/any", &lines);
                in_time(&format!("the list: {what}"), LONGEST);
                answer.status
            });
            await_true("it hangs", 10 + SLACK, || !lab.dir.join(&file).exists());
            let single = scope.spawn(|| {
                let answer = ask("PUT /drop/output/any/4.4.4.4");
                in_time(&format!("a PUT: {what}"), LONGEST);
                answer.status
            });
            await_true("it expires", LONGEST + 2 + SLACK, || !due_is_there());
            in_time(&format!("an expiry: {what}"), LONGEST + 2);
            for status in [batch.join().unwrap(), single.join().unwrap()] {
                assert!([200, 503].contains(&status), "{what}: {status}");
            }
        });
        lab.stand_in("");
        let works = || ask("PUT /drop/output/any/4.4.4.4").status == 200;
        await_true(&format!("rfw works again: {what}"), SLACK, works);
        assert_eq!(list("PUT /drop/input/any", "3.3.3.3\n3::3\n").sums(), "exists 2", "{what}");
        rfw.kill();
        lab.reboot();
        sh("rm -f lab/state");
        lab.stand_in(NEXT);
    }
}

/// Reads nothing.
const HANG: &str = "exec /bin/sleep 100";
/// Reads slowly, so that no single write takes long.
const DRIP: &str = "while /usr/bin/head -c 8192 > /dev/null; do /bin/sleep 1.5; done";

#[test]
fn one_hung_batch_blocked_everything() {
    both(|lab| {
        let slow = (
            "iptables-restore",
            "/bin/sleep 8; echo \"exec /bin/sleep 100\" > $lab/next-ip6tables-restore",
        );
        let faults = [("iptables-restore", HANG), ("ip6tables-restore", DRIP), slow];
        hung_batch(lab, FORMS[0], &faults);
    });
}

#[test]
fn one_hung_batch_blocked_everything_in_sets() {
    both(|lab| hung_batch(lab, FORMS[3], &[("ipset", HANG), ("ipset", DRIP)]));
}

/// Failures of ip6tables, once while rfw starts. On the first, iptables-nft exits 4; on the second, it
/// exits 0 with part of its listing.
const IPV6_FAULTS: [&str; 5] = [
    "exec /usr/bin/strace -qq -o /dev/null -e inject=sendto:error=ENOBUFS:when=1 $real \"$@\"",
    "exec /usr/bin/strace -qq -o /dev/null -e inject=sendto:error=ENOBUFS:when=3 $real \"$@\"",
    "echo 'ip6tables: No buffer space available.' >&2; exit 1",
    "kill -9 $$",
    "case \"$*\" in *' -S'*) exit 0;; esac",
];

#[test]
fn ipv6_failed_open() {
    if !has_strace("commits::ipv6_failed_open") {
        return;
    }
    both(|lab| {
        tls::keys(lab);
        in_forms(lab, &FORMS, tls::CONF, |rfw, form| {
            let lines = "1.1.1.1\n2001:db8::1\n2001:db8:1::/64\n";
            assert_eq!(list("PUT /drop/input/any", lines).sums(), "inserted 3");
            let (all, guards) = (enforced(lab), lab.guards());
            lab.stand_in(
                "case $me in ip6*)
                    n=$(/bin/cat $lab/n)
                    echo $((n - 1)) > $lab/n
                    [ $n != 0 ] || { /bin/mv $lab/fault $lab/fault.$$ && . $lab/fault.$$; }
                esac",
            );
            for fault in IPV6_FAULTS {
                // The first run of ip6tables or its restore, or a later one.
                for n in 0..4 {
                    let what = format!("{form:?} run {n}: {fault}");
                    rfw.kill();
                    if form.file {
                        lab.reboot();
                    }
                    lab.write("fault", fault);
                    lab.write("n", &n.to_string());
                    lab.write("rfw.log", "");
                    let ended = rfw.try_restart(10 + SLACK);
                    sh("rm -f lab/fault");
                    match ended {
                        None => {
                            let is = (enforced(lab), lab.guards());
                            assert_eq!(is, (all.clone(), guards.clone()), "{what}");
                            let put = "PUT /drop/input/any/2001:db8::1";
                            let answer = ask(put).brief();
                            assert!(["200 exists", "200 refreshed"].contains(&&*answer), "{what}");
                        }
                        status => assert_eq!(status, Some(1), "{what}"),
                    }
                    let log = if ended.is_none() { lab.log() } else { lab.read("rfw.log") };
                    assert!(!log.contains("IPv6 rules are not accepted"), "{what}\n{log}");
                }
            }
            lab.stand_in("");
            rfw.restart();
            assert_eq!((enforced(lab), lab.guards()), (all, guards));
        });
    });
}

/// Successive requests, and what is enforced after them: "drop 1.1.1.1".
const CHANGES: [(&str, &str, &[&str]); 7] = [
    ("PUT /drop/input/any/1.1.1.1", "", &["drop 1.1.1.1"]),
    ("PUT /drop/input/any/1.1.1.1?expire=1h", "", &["drop 1.1.1.1"]),
    ("PUT /drop/input/any/2001:db8::1", "", &["drop 1.1.1.1", "drop 2001:db8::1"]),
    ("DELETE /drop/input/any/1.1.1.1", "", &["drop 2001:db8::1"]),
    ("PUT /drop/input/any", "1.1.1.1\n2::2\n", &["drop 1.1.1.1", "drop 2001:db8::1", "drop 2::2"]),
    ("DELETE /drop/input/any", "1.1.1.1\n2001:db8::1\n", &["drop 2::2"]),
    ("DELETE /drop/input/any/2::2", "", &[]),
];

fn send(request: &str, lines: &str) -> Answer {
    if lines.is_empty() { ask(request) } else { list(request, lines) }
}

/// Once the tools work, the kernel, GET /list and the state file match the responses.
fn assert_recovers(lab: &Lab, want: &[String], what: &str) {
    await_true(&format!("{want:?}: {what}"), RECOVERY, || enforced(lab) == want);
    assert_eq!(listed(), want, "{what}");
}

/// So does a restart, with a state file even if the kernel has lost everything.
fn assert_restarts(lab: &Lab, rfw: &mut Rfw<'_>, form: Form, want: &[String], what: &str) {
    rfw.kill();
    if form.file {
        lab.reboot();
    }
    rfw.restart();
    assert_eq!((enforced(lab), listed()), (want.to_vec(), want.to_vec()), "restarted: {what}");
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

#[test]
fn what_was_committed_before_exit_1_was_answered_with_500_and_stayed() {
    both(|lab| {
        in_forms(lab, &FORMS, "", |rfw, form| {
            for fault in [
                "$real \"$@\"; exit 1",
                // The undo fails.
                "case \"$* \" in *'-D '*|*'del '*) exit 1;; esac; $real \"$@\"; exit 1",
                "$real \"$@\"; echo 'Bad luck.' >&2; exit 4",
                "$real \"$@\"; kill -9 $$",
                // Only once: the repair succeeds.
                "[ -e $lab/fault ] || { /bin/touch $lab/fault; $real \"$@\"; exit 1; }",
            ] {
                let mut before = words(&[]);
                for (request, lines, after) in CHANGES {
                    let what = format!("{form:?} {request} {lines:?} {fault}");
                    let after = words(after);
                    sh("rm -f lab/fault");
                    spoil(lab, "*", fault);
                    let answer = send(request, lines);
                    let done = answer.status == 200;
                    assert!(done || [500, 503].contains(&answer.status), "{what} {answer:?}");
                    let truth = if done { &after } else { &before };
                    // If it was killed, rfw need not retry at once.
                    if done || !fault.contains("kill") {
                        assert_eq!(enforced(lab), *truth, "{what} {answer:?}");
                    }
                    lab.stand_in("");
                    assert_recovers(lab, truth, &what);
                    let answer = send(request, lines);
                    assert_eq!(answer.status, 200, "{what} {answer:?}");
                    assert_eq!((enforced(lab), listed()), (after.clone(), after.clone()), "{what}");
                    before = after;
                }
                assert_restarts(lab, rfw, form, &before, fault);
            }
        });
    });
}

/// The second half fails, and nothing can be read afterwards: what do the next requests find?
#[test]
fn half_of_a_list_was_there_and_delete_said_absent_or_put_doubled_it() {
    both(|lab| {
        in_forms(lab, &FORMS[..2], "", |rfw, form| {
            let lines = "1.1.1.1\n1.1.1.2\n2001:db8::1\n";
            for fault in ["exit 1", "$real \"$@\"; exit 1", "kill -9 $$"] {
                for deaf in ["exit 1", "exit 0", "kill -9 $$"] {
                    for (request, after) in [
                        ("DELETE /drop/input/any/1.1.1.1", words(&[])),
                        ("PUT /drop/input/any/1.1.1.1", words(&["drop 1.1.1.1"])),
                        ("PUT /drop/input/any/1.1.1.1?expire=1h", words(&["drop 1.1.1.1"])),
                    ] {
                        let what = format!("{form:?} {fault}, {deaf}, {request}");
                        lab.stand_in(&format!(
                            "case \"$me $*\" in
                                ip6tables-restore*|ip6tables*' -I '*) /bin/touch $lab/deaf; {fault};;
                                *' -S'*) [ ! -e $lab/deaf ] || {{ {deaf}; }};;
                            esac"
                        ));
                        let answer = list("PUT /drop/input/any", lines);
                        let whole = words(&["drop 1.1.1.1", "drop 1.1.1.2", "drop 2001:db8::1"]);
                        assert!([200, 500, 503].contains(&answer.status), "{what} {answer:?}");
                        let done = answer.status == 200;
                        lab.stand_in("");
                        sh("rm -f lab/deaf");
                        let answer = ask(request);
                        assert_eq!(answer.status, 200, "{what} {answer:?}");
                        let is = enforced(lab);
                        let there = is.iter().filter(|rule| *rule == "drop 1.1.1.1").count();
                        assert_eq!(there, after.len(), "{what} {answer:?} {is:?}");
                        let mut want = if done { whole.clone() } else { vec![] };
                        want.retain(|rule| rule != "drop 1.1.1.1");
                        want.extend(after);
                        want.sort();
                        assert_recovers(lab, &want, &what);
                        list("DELETE /drop/input/any", lines);
                        assert_recovers(lab, &[], &what);
                    }
                }
            }
            assert_restarts(lab, rfw, form, &[], "all is deleted");
        });
    });
}

/// ipset accepts as many lines as `$lab/lines` says (a command is one) and then FAILS, as long as that
/// file exists.
const TAKES: &str = r#"if [ $me = ipset ] && left=$(/bin/cat $lab/lines 2> /dev/null); then
case "$*" in
*list*|*save*) ;;
*restore*)
    /bin/cat > $lab/in.$$
    if [ $(/usr/bin/wc -l < $lab/in.$$) -gt $left ]; then
        echo 0 > $lab/lines
        /usr/bin/head -n $left $lab/in.$$ | $real "$@"
        FAILS
    fi
    echo $((left - $(/usr/bin/wc -l < $lab/in.$$))) > $lab/lines
    exec $real "$@" < $lab/in.$$;;
*)  [ $left -gt 0 ] || { FAILS; }
    echo $((left - 1)) > $lab/lines;;
esac
fi"#;

const REFUSES: &str = "echo 'ipset: Bad luck.' >&2; exit 1";

/// Changes of an address that is dropped, and of one that is not, with their results.
const MOVES: [(&str, &str, &[&str]); 5] = [
    ("PUT /accept/input/any/1.1.1.1", "", &["accept 1.1.1.1", "drop 1.1.1.2"]),
    (
        "PUT /accept/input/any?expire=1h",
        "1.1.1.1\n1.1.1.2\n",
        &["accept 1.1.1.1", "accept 1.1.1.2"],
    ),
    ("DELETE /drop/input/any/1.1.1.1", "", &["drop 1.1.1.2"]),
    ("PUT /drop/input/any/1.1.1.3", "", &["drop 1.1.1.1", "drop 1.1.1.2", "drop 1.1.1.3"]),
    ("DELETE /drop/input/any", "1.1.1.1\n1.1.1.2\n", &[]),
];

#[test]
fn a_failed_change_in_sets_was_half_applied() {
    both(|lab| {
        in_forms(lab, &FORMS[2..], "", |rfw, form| {
            // So that no set must be created.
            ask("PUT /accept/input/any/9.9.9.9");
            let with_nine = |some: &[&str]| {
                let mut all = [some, &["accept 9.9.9.9"]].concat();
                all.sort_unstable();
                words(&all)
            };
            let before = with_nine(&["drop 1.1.1.1", "drop 1.1.1.2"]);
            for fails in [REFUSES, "kill -9 $$"] {
                // How many lines are accepted, and whether all others fail until the second request.
                for (lines, persists) in [(1, true), (1, false), (2, false)] {
                    for (request, body, after) in MOVES {
                        let what = format!("{form:?} {request} after {lines} lines: {fails}");
                        list("PUT /drop/input/any", "1.1.1.1\n1.1.1.2\n");
                        assert_eq!(ask("DELETE /drop/input/any/1.1.1.3").status, 200);
                        assert_eq!(enforced(lab), before, "{what}");
                        let once = if persists { "" } else { "/bin/rm $lab/lines; " };
                        lab.write_data("lines", &lines.to_string());
                        lab.stand_in(&TAKES.replace("FAILS", &format!("{once}{fails}")));
                        let answer = send(request, body);
                        let done = answer.status == 200;
                        assert!(done || [500, 503].contains(&answer.status), "{what} {answer:?}");
                        if persists {
                            let other = ask("PUT /drop/output/any/7.7.7.7");
                            assert!(other.status >= 500, "{what} {other:?}");
                        }
                        sh("rm -f lab/lines");
                        lab.stand_in("");
                        if persists {
                            transcript(&[
                                ("PUT /drop/output/any/7.7.7.7", "200 inserted"),
                                ("DELETE /drop/output/any/7.7.7.7", "200 deleted"),
                            ]);
                        }
                        let want = if done { with_nine(after) } else { before.clone() };
                        assert_recovers(lab, &want, &what);
                        // Failed attempts must not come back from the file.
                        if form.file {
                            assert_restarts(lab, rfw, form, &want, &what);
                        }
                    }
                }
            }
        });
    });
}

#[test]
fn a_list_that_was_applied_counted_as_not_applied() {
    both(|lab| {
        in_forms(lab, &[FORMS[1], FORMS[3]], "", |rfw, form| {
            let lines = "1.1.1.1\n1.1.1.2\n2001:db8::1\n";
            let all = words(&["drop 1.1.1.1", "drop 1.1.1.2", "drop 2001:db8::1"]);
            for fault in ["kill -9 $$", "exit 1"] {
                for program in ["iptables-restore", "ip6tables-restore", "ipset"] {
                    for (request, after) in [("PUT", all.clone()), ("DELETE", vec![])] {
                        let what = format!("{form:?} {request}, {program}: {fault}");
                        let before = enforced(lab);
                        lab.stand_in(NEXT);
                        // All of its lines are applied before it fails.
                        lab.write_data(
                            &format!("next-{program}"),
                            &format!("$real \"$@\"; {fault}"),
                        );
                        let answer = list(&format!("{request} /drop/input/any"), lines);
                        lab.stand_in("");
                        sh("rm -f lab/next-*");
                        let done = answer.status == 200;
                        assert!(done || [500, 503].contains(&answer.status), "{what} {answer:?}");
                        let want = if done { after.clone() } else { before };
                        assert_recovers(lab, &want, &what);
                        assert_restarts(lab, rfw, form, &want, &what);
                        assert_eq!(list(&format!("{request} /drop/input/any"), lines).status, 200);
                        assert_eq!((enforced(lab), listed()), (after.clone(), after), "{what}");
                    }
                }
            }
        });
    });
}

#[test]
fn a_start_with_a_state_file_allowed_ten_seconds_for_a_listing() {
    both(|lab| {
        in_forms(lab, &[FORMS[1], FORMS[3]], "", |rfw, form| {
            assert_eq!(list("PUT /drop/input/any", "1.1.1.1\n2001:db8::1\n").sums(), "inserted 2");
            let all = enforced(lab);
            rfw.kill();
            lab.reboot();
            lab.stand_in(READS);
            // The first listing, and the one that follows it.
            let slow = "/bin/sleep 11";
            lab.write("second", slow);
            lab.write_data(
                "lie-iptables",
                &format!("/bin/mv $lab/second $lab/lie-iptables; {slow}"),
            );
            lab.write_data("lie-ipset", slow);
            let ended = rfw.try_restart(60 + SLACK);
            assert_eq!(ended, None, "{form:?}: {}", lab.read("stderr"));
            assert_eq!(enforced(lab), all, "{form:?}");
            sh("rm -f lab/lie-* lab/second");
        });
    });
}

#[test]
fn sets_were_not_batched() {
    if !has_strace("commits::sets_were_not_batched") {
        return;
    }
    both(|lab| {
        modes(lab, "state.file = state", |rfw, sets| {
            ask("PUT /drop/input/any/9.9.9.9");
            // What rfw does each second counts, too: the best of some tries has none of it.
            let fewest = (0..5).map(|turn| {
                lab.write("trace", "");
                let tracer = trace(rfw, "-o /run/lab/trace -e trace=execve,fdatasync");
                let mut conns: Vec<_> = (0..64).map(|_| Conn::open()).collect();
                conns.iter_mut().for_each(|conn| assert_eq!(conn.ask("GET /").status, 200));
                let before = lab.read("trace").lines().count();
                for (n, conn) in conns.iter_mut().enumerate() {
                    let line = format!("PUT /drop/input/any/10.0.{turn}.{n} HTTP/1.1\r\n");
                    conn.send(format!("{line}Host: localhost\r\n\r\n"));
                }
                for conn in &mut conns {
                    assert_eq!(conn.answer().unwrap().brief(), "200 inserted");
                }
                let text = lab.read("trace");
                drop(tracer);
                let count = |call| text.lines().skip(before).filter(|l| l.contains(call)).count();
                println!(
                    "sets: {sets}: {} execve, {} fdatasync",
                    count("execve("),
                    count("fdatasync(")
                );
                assert!(count("fdatasync(") > 0, "{text}");
                count("execve(").max(count("fdatasync("))
            });
            let fewest = fewest.min().unwrap();
            assert!(fewest <= 8, "sets: {sets}: {fewest} programs or syncs at the least");
            assert_eq!(enforced(lab).len(), 321);
            sh("rm -f lab/state");
        });
    });
}

/// Restores of more than a hundred lines take six seconds.
const SLOW: &str = r#"case "$*" in *restore*|*noflush*)
    /bin/cat > $lab/in.$$
    if [ $(/usr/bin/wc -l < $lab/in.$$) -gt 100 ]; then /bin/touch $lab/begun; /bin/sleep 6; fi
    $real "$@" < $lab/in.$$; exit $?
esac"#;

#[test]
fn an_expiry_was_late_while_lists_arrived() {
    both(|lab| {
        in_forms(lab, &[FORMS[0], FORMS[2]], "", |rfw, form| {
            // Rules with two addresses remain rules with sets, too.
            let due = "/drop/forward/any/1.1.1.1/any/2.2.2.2";
            let there = |path: &str| match path {
                _ if path == due => lab.iptables("-S FORWARD").contains("-s 1.1.1.1/32 -d 2.2.2.2"),
                _ => enforced(lab).contains(&"drop 3.3.3.3".to_string()),
            };
            let lists = [1, 2, 3]
                .map(|third| (0..200).map(|n| format!("10.0.{third}.{n}\n")).collect::<String>());
            assert_eq!(list("PUT /drop/input/any", "9.9.9.9\n").sums(), "inserted 1");
            assert_eq!(ask(&format!("PUT {due}?expire=3")).brief(), "200 inserted");
            lab.stand_in(SLOW);
            let send = |lines: &String| {
                let mut conn = Conn::open();
                conn.send_list("PUT /drop/input/any", lines);
                conn
            };
            let mut first = send(&lists[0]);
            let begun = || lab.dir.join("begun").exists();
            await_true("the first list is on its way", 10 + SLACK, begun);
            let mut others = [send(&lists[1]), send(&lists[2])];
            rfw.await_queued();
            let mut put = Conn::open();
            put.send("PUT /drop/input/any/3.3.3.3 HTTP/1.1\r\nHost: localhost\r\n\r\n");
            assert_eq!(first.answer().unwrap().sums(), "inserted 200", "{form:?}");
            let from = Instant::now();
            await_true("both go ahead of the lists that wait", 2 + SLACK, || {
                !there(due) && there("/drop/input/any/3.3.3.3")
            });
            println!("{form:?}: {:?} after the first list", from.elapsed());
            assert_eq!(put.answer().unwrap().brief(), "200 inserted", "{form:?}");
            for other in &mut others {
                assert_eq!(other.answer().unwrap().sums(), "inserted 200", "{form:?}");
            }
            sh("rm lab/begun");
        });
    });
}

/// The lines of a state file after its header; where it is certainly damaged, so that rfw must not start.
const COUNTS: [(&str, bool); 5] = [
    ("* 5|+ 0 /drop/input/any/1.1.1.1|* 1|+ 0 /drop/input/any/2.2.2.2", true),
    (
        "+ 0 /drop/input/any/9.9.9.9|* 30|+ 0 /drop/input/any/1.1.1.1|* 0|- /drop/input/any/2.2.2.2",
        true,
    ),
    (
        "+ 0 /drop/input/any/9.9.9.9|* 3|+ 0 /drop/input/any/1.1.1.1|+ 0 /drop/input/any/2.2.2.2",
        false,
    ),
    (
        "+ 0 /drop/input/any/9.9.9.9|* 30|+ 0 /drop/input/any/1.1.1.1|- /drop/input/any/2.2.2.2",
        false,
    ),
    (
        "+ 0 /drop/input/any/9.9.9.9|* 4000000000|+ 0 /drop/input/any/1.1.1.1|+ 7 /drop/input/any/2.2.2.2",
        false,
    ),
];

#[test]
fn a_count_that_was_too_large_dropped_all_that_followed_in_silence() {
    both(|lab| {
        for form in [FORMS[1], FORMS[3]] {
            lab.stand_in("");
            lab.configure(&format!("local.server\n{}", of_form(form)));
            for (lines, is_damage) in COUNTS {
                let text = format!("rfw state 1\n{}\n", lines.replace('|', "\n"));
                let what = format!("{form:?} {lines}");
                lab.write("state", &text);
                lab.write("rfw.log", "");
                lab.write("stderr", "");
                let (status, said) = lab.rfw("-t -f /run/lab/rfw.conf");
                let mut rfw = lab.launch(&[]);
                let ended = rfw.await_start(10 + SLACK);
                if is_damage || status == 1 || ended.is_some() {
                    assert_eq!((status, ended), (1, Some(1)), "{what}: {said}");
                    for said in [said, lab.read("stderr")] {
                        assert!(
                            said.contains("state:") && said.lines().count() == 1,
                            "{what}: {said}"
                        );
                    }
                    assert_eq!((lab.read("state"), enforced(lab)), (text, vec![]), "{what}");
                    continue;
                }
                // As after a power cut; the log shows what is dropped.
                assert_eq!(enforced(lab), ["drop 9.9.9.9"], "{what}");
                let log = lab.log();
                let warned = |line: &str| line.contains(" WARNING ") && line.contains("state:3");
                assert!(log.lines().any(warned), "{what}\n{log}");
                for dropped in lines.split('|').skip(2) {
                    assert!(log.contains(dropped), "{what}: {dropped} is not in\n{log}");
                }
                drop(rfw);
                lab.reboot();
            }
        }
    });
}

fn log_has(lab: &Lab, words: &[&str]) -> bool {
    let log = lab.read("rfw.log");
    log.lines().any(|line| words.iter().all(|word| line.contains(word)))
}

#[test]
fn messages_of_a_guard_that_was_restored() {
    both(|lab| {
        tls::keys(lab);
        let _rfw = lab.start(&format!("local.server\n{}", tls::CONF));
        for (chain, rule) in
            [("INPUT", 1), ("OUTPUT", 1), ("INPUT", lab.iptables("-S INPUT").lines().count() - 1)]
        {
            let guards = lab.guards();
            lab.clear_log();
            lab.iptables(&format!("-D {chain} {rule}"));
            await_repair("it is restored", 3 + SLACK, || lab.guards() == guards);
            let is_logged = || log_has(lab, &["restored", "guard rule for port 7393"]);
            await_true("the log names the guard", SLACK, is_logged);
            assert!(!log_has(lab, &["restored /"]), "{}", lab.read("rfw.log"));
        }
    });
}

#[test]
fn messages_about_a_state_file_that_a_person_has_edited() {
    both(|lab| {
        in_forms(lab, &[FORMS[1], FORMS[3]], "", |rfw, form| {
            transcript(&[
                ("PUT /drop/input/any/1.1.1.1", "200 inserted"),
                ("PUT /drop/input/any/2.2.2.2?expire=1h", "200 inserted"),
                ("PUT /drop/input/any/3.3.3.3", "200 inserted"),
            ]);
            // One expires later, one is deleted, one is new: the kernel still has the old rules.
            let edit = |script: &str| sh(&format!("sed -i '{script}' lab/state"));
            // Longer than a set can keep an entry.
            let time = if form.sets { 0 } else { 4_000_000_000_u64 };
            edit(&format!("/3.3.3.3/d; /2.2.2.2/s/+ [0-9]*/+ {time}/"));
            edit("$a + 0 /drop/input/any/4.4.4.4");
            lab.clear_log();
            rfw.restart();
            assert_eq!(enforced(lab), ["drop 1.1.1.1", "drop 2.2.2.2", "drop 4.4.4.4"]);
            // The log blames no one for what the person has changed.
            let blames = || {
                let is_blame = |line: &str| {
                    let words = [" removed, ", " restored ", " expired "];
                    let is_event = words.iter().any(|word| line.contains(word));
                    is_event && !line.ends_with(" current rules: /drop/input/any/3.3.3.3")
                };
                lab.log().lines().any(is_blame)
            };
            assert!(!blames(), "{}", lab.read("rfw.log"));
            // Under a running rfw.
            edit("$a + 0 /drop/input/any/5.5.5.5");
            let answer = ask("PUT /drop/input/any/6.6.6.6");
            assert_eq!(answer.brief(), "507 state_failed");
            assert_eq!(metric("rfw_kernel_failures_total"), 1);
            let message = answer.field("message").to_lowercase();
            assert!(
                !message.contains("room") && !message.contains("take state.file out"),
                "{message}"
            );
            let advice = ["restart", "start rfw"].iter().any(|words| message.contains(words));
            assert!(advice, "{message}");
            await_true("a warning", SLACK, || log_has(lab, &[" WARNING ", "507 state_failed"]));
            rfw.restart();
            let all = ["drop 1.1.1.1", "drop 2.2.2.2", "drop 4.4.4.4", "drop 5.5.5.5"];
            assert_eq!(enforced(lab), all);
            assert!(!blames(), "{}", lab.read("rfw.log"));
        });
    });
}

#[test]
fn messages_about_an_xtables_lock_that_is_held_at_start() {
    both(|lab| {
        let says = "echo 'Another app is currently holding the xtables lock.' >&2; exit 4";
        let start = |what: &str| {
            lab.configure("local.server\nstate.file = state");
            lab.write("state", "rfw state 1\n+ 0 /drop/input/any/1.1.1.1\n");
            lab.write("stderr", "");
            assert_eq!(lab.launch(&[]).await_start(60), Some(1), "{what}");
            let said = lab.read("stderr");
            assert!(said.contains("xtables lock"), "{what}: {said}");
            for wrong in ["CAP_NET_ADMIN", "root", "xt_comment", "iptables.path"] {
                assert!(!said.contains(wrong), "{what}: {said}");
            }
        };
        lab.stand_in(&format!("case \"$*\" in *-w*) {says};; esac"));
        start("from the beginning");
        lab.stand_in_for_changes(says);
        start("when something is to be changed");
        lab.stand_in("");
        let _holder = Process::start("flock -F /run/xtables.lock sleep 100");
        let held = || sh("flock -n /run/xtables.lock true && echo free || echo held") == "held\n";
        await_true("the lock is held", SLACK, held);
        if lab.real("iptables").contains("legacy") {
            start("by another program");
        }
    });
}

#[test]
fn messages_write_ipv6_and_show_507_as_a_warning() {
    both(|lab| {
        in_forms(lab, &FORMS, "ipset.maxelem = 1", |rfw, form| {
            assert_eq!(list("PUT /drop/input/any", "1.1.1.1\n2001:db8::1\n").sums(), "inserted 2");
            if form.sets {
                assert_eq!(ask("PUT /drop/input/any/2.2.2.2").brief(), "507 set_full");
                await_true("a warning", SLACK, || log_has(lab, &[" WARNING ", "507 set_full"]));
            }
            lab.iptables("-F");
            lab.ip6tables("-F");
            let all = ["drop 1.1.1.1", "drop 2001:db8::1"];
            await_repair("it is restored", 3 + SLACK, || enforced(lab) == all);
            rfw.restart();
            let log = lab.log() + &lab.read("stderr");
            assert!(!log.contains("IPV6") && !log.contains("IPV4"), "{log}");
        });
    });
}
