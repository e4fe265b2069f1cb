//! The state file: its content, and what rfw does if it is incomplete, damaged, or cannot be written.
//! Kills and reboots under load are in `crash`.

use crate::faults::inject;
use crate::kernel::CLOCK;
use crate::lab::*;
use std::fs;
use std::os::unix::fs::MetadataExt;

const CONF: &str = "local.server\nstate.file = state";
const HEADER: &str = "rfw state 2\n";

/// The file without its header.
fn lines(lab: &Lab) -> String {
    lab.read("state").strip_prefix(HEADER).expect("a header").into()
}

fn state(lab: &Lab, lines: &str) {
    lab.write("state", &format!("{HEADER}{lines}"));
}

#[test]
fn one_line_per_change() {
    both(|lab| {
        modes(lab, "state.file = state", |_, _| {
            let expires = ask("PUT /drop/input/eth0/1.2.3.4?expire=1h").expires();
            ask("PUT /accept/forward/any/5.5.5.0/24/ppp/6.6.6.6");
            ask("DELETE /drop/input/eth0/1.2.3.4");
            list("PUT /reject/output/any", "2001:db8::/64\n7.7.7.7\n");
            let wanted = format!(
                "+ {expires} /drop/input/eth0/1.2.3.4\n\
                 + 0 /accept/forward/any/5.5.5.0/24/ppp+/6.6.6.6\n\
                 - /drop/input/eth0/1.2.3.4\n"
            );
            let listed =
                "* 2\n+ 0 /reject/output/any/7.7.7.7\n+ 0 /reject/output/any/2001:db8::/64\n";
            assert_eq!(lines(lab), format!("{wanted}{listed}"));
            assert_eq!(fs::metadata(lab.dir.join("state")).unwrap().mode() & 0o777, 0o600);
            // A request that changes nothing writes nothing.
            ask("PUT /accept/forward/any/5.5.5.0/24/ppp/6.6.6.6");
            ask("DELETE /drop/output/any/9.9.9.9");
            assert_eq!(lines(lab), format!("{wanted}{listed}"));
            fs::remove_file(lab.dir.join("state")).unwrap();
        });
    });
}

#[test]
fn a_reboot_brings_back_rules_order_and_expiry() {
    both(|lab| {
        modes(lab, "state.file = state", |rfw, _| {
            lab.iptables("-A INPUT -s 9.9.9.9 -j DROP");
            ask("PUT /drop/input/any/1.1.1.1");
            ask("PUT /accept/input/any/1.1.1.0/24?expire=1h");
            ask("PUT /drop/input/any/1.1.1.1?expire=2h");
            ask("PUT /drop/forward/any/8.8.8.8/any/2.2.2.2");
            let soon = ask("PUT /reject/output/eth0/2001:db8::1?expire=1").expires();
            list("PUT /drop/input/any", "3.3.3.0-3.3.3.9\n5::/64\n");
            await_time(soon + 1);
            await_true("one expires", 4 + SLACK, || lab.kept().len() == 6);
            // An empty set and its rule may stay until a restart.
            rfw.restart();
            let (kept, rules) = (lab.kept(), lab.rules());
            rfw.kill();
            lab.reboot();
            rfw.restart();
            let again = lab.kept();
            for ((was, expired), (is, expires)) in kept.iter().zip(&again) {
                let near = expired.unwrap_or(0).abs_diff(expires.unwrap_or(0)) <= 2;
                assert!(was == is && near, "{kept:?}\n{again:?}");
            }
            assert_eq!((again.len(), lab.rules()), (kept.len(), rules));
            // If nothing is lost, nothing is done.
            rfw.restart();
            assert_eq!(lab.kept().len(), kept.len());
            sh("rm lab/state");
        });
    });
}

#[test]
fn a_file_of_version_1_becomes_version_2() {
    once(|lab| {
        lab.write("state", "rfw state 1\n+ 0 /drop/input/any/1.1.1.1\n");
        let _rfw = lab.start(CONF);
        let is_new = || lab.read("state") == "rfw state 2\n+ 0 /drop/input/any/1.1.1.1\n";
        await_true("it is rewritten", SLACK, is_new);
        ask("PUT /drop/input/any/1.1.1.1?tag=a");
        assert_eq!(lines(lab), "+ 0 /drop/input/any/1.1.1.1\n+ 0 /drop/input/any/1.1.1.1@a\n");
    });
}

/// The limit of `expire` applies to requests: rules accepted by an older rfw remain.
#[test]
fn an_expiry_of_more_than_ten_years_stays() {
    both(|lab| {
        const LATE: &str = "99999999999";
        lab.iptables(&format!("-I INPUT -s 1.1.1.1 -m comment --comment rfw:{LATE} -j DROP"));
        let late = |count| {
            let listed = ask("GET /list").body.matches(&format!("\"expires\":{LATE},")).count();
            assert_eq!((listed, lab.rules().len()), (count, count), "{:?}", lab.rules());
        };
        let mut rfw = lab.start("local.server");
        late(1);
        ask("PUT /drop/input/any/3.3.3.3");
        ask("DELETE /drop/input/any/3.3.3.3");
        late(1);
        rfw.kill();
        state(
            lab,
            &format!("+ {LATE} /drop/input/any/1.1.1.1\n+ {LATE} /drop/input/any/2.2.2.2\n"),
        );
        let mut rfw = lab.start(CONF);
        late(2);
        rfw.kill();
        let _rfw = lab.start(&format!("{CONF}\n{SETS}"));
        assert_eq!(lab.entries().len(), 2);
        assert_eq!(lines(lab).matches(LATE).count(), 2);
    });
}

/// The kernel's list is adopted once; from then on, the file is the list.
#[test]
fn the_file_or_the_kernel_is_the_list() {
    both(|lab| {
        modes(lab, "", |rfw, sets| {
            ask("PUT /drop/input/any/1.1.1.1");
            let expires = ask("PUT /drop/input/any/2.2.2.2?expire=1h").expires();
            ask("PUT /drop/forward/any/8.8.8.8/any/2.2.2.2");
            rfw.kill();
            let more = if sets { SETS } else { "" };
            lab.configure(&format!("{CONF}\n{more}"));
            rfw.restart();
            let taken = lines(lab);
            assert_eq!(taken.lines().count(), 3, "{taken}");
            let near =
                |second: u64| taken.contains(&format!("+ {second} /drop/input/any/2.2.2.2\n"));
            assert!((expires - 3..=expires + 3).any(near), "{taken}");
            rfw.kill();
            lab.iptables("-I INPUT -s 7.7.7.7 -m comment --comment rfw -j DROP");
            state(lab, "+ 0 /drop/input/any/1.1.1.1\n+ 1 /drop/input/any/8.8.8.8\n");
            rfw.restart();
            assert_eq!(lab.kept().into_keys().collect::<Vec<_>>(), ["1.1.1.1"]);
            sh("rm lab/state");
        });
    });
}

#[test]
fn sets_come_and_go_with_the_file() {
    both(|lab| {
        let mut rfw = lab.start(CONF);
        ask("PUT /drop/input/any/1.1.1.1?expire=1h");
        ask("PUT /accept/input/any/1.1.1.1");
        ask("PUT /drop/forward/any/8.8.8.8/any/2.2.2.2");
        ask("PUT /drop/output/any/5::");
        let rules = lab.rules();
        lab.configure(&format!("{CONF}\n{SETS}"));
        rfw.restart();
        assert_eq!(lab.rules().iter().filter(|rule| rule.contains("--match-set")).count(), 2);
        assert_eq!(lab.entries().len(), 2);
        // A PUT removes the address from the other target's set, also in the file.
        assert_eq!(ask("PUT /drop/input/any/1.1.1.1").brief(), "200 inserted");
        assert_eq!(ask("DELETE /drop/input/any/1.1.1.1").brief(), "200 deleted");
        lab.configure(CONF);
        rfw.restart();
        assert_eq!(lab.rules(), [&rules[2], &rules[3]].map(String::clone));
        assert_eq!(lab.ipset("list -n"), "");
    });
}

/// At every byte of its last three lines.
#[test]
fn a_power_cut() {
    once(|lab| {
        let put = |n: u8| format!("+ 0 /drop/input/any/10.0.0.{n}\n");
        let whole = format!("{HEADER}{}{}{}{}", put(1), put(2), put(3), put(4));
        lab.configure(CONF);
        for end in HEADER.len() + put(1).len()..=whole.len() {
            lab.write("state", &whole[..end]);
            lab.write("rfw.log", "");
            let mut rfw = lab.launch(&[]);
            rfw.await_ready();
            let count = (end - HEADER.len()) / put(1).len();
            assert_eq!(lab.rules().len(), count, "{end}");
            let torn = HEADER.len() + count * put(1).len() < end;
            assert_eq!(lab.log().contains("the last line is incomplete"), torn, "{end}");
            assert_eq!(ask("PUT /drop/input/any/7.7.7.7").status, 200);
            drop(rfw);
            assert_eq!(lines(lab).lines().count(), count + 1, "{end}");
            lab.reboot();
        }
    });
}

#[test]
fn damage_is_reported_and_nothing_is_changed() {
    both(|lab| {
        let mut rfw = lab.start("local.server");
        ask("PUT /drop/input/any/1.1.1.1");
        rfw.kill();
        let rules = lab.rules();
        lab.configure(CONF);
        let table = [
            ("+ 0 /drop/input/any/10.0.0.1\nx\n", "/run/lab/state:3: 'x' is not a valid line"),
            ("\0\0\0\n", "/run/lab/state:2: "),
            ("+ 0 /drop/input/any/1.2.3.4/3\n", "/run/lab/state:2: "),
            ("+ 0 /drop/input/any/1.2.3.4\r\n", "1.2.3.4\\r' is not a valid line"),
        ];
        for (text, words) in table {
            state(lab, text);
            for arguments in ["-t -f /run/lab/rfw.conf", "-f /run/lab/rfw.conf --logfile -"] {
                let (status, said) = lab.rfw(arguments);
                assert!(status == 1 && said.contains(words), "{said}");
            }
            assert_eq!((lab.rules(), lines(lab)), (rules.clone(), text.into()));
        }
        lab.write("state", "something else\n");
        assert!(lab.rfw("-t -f /run/lab/rfw.conf").1.contains("/run/lab/state:1: "));
        sh("chmod 666 lab/state");
        assert!(lab.rfw("-t -f /run/lab/rfw.conf").1.contains("chmod go-w"));
        sh("rm lab/state; mkfifo lab/state");
        assert!(lab.rfw("-t -f /run/lab/rfw.conf").1.contains("is not a regular file"));
        sh("rm lab/state");
        lab.configure("local.server\nstate.file = none/state");
        for arguments in ["-t -f rfw.conf", "-f rfw.conf --logfile -"] {
            let said = lab.rfw(arguments).1;
            assert!(
                said.contains("rfw.conf:5: none/state: its directory does not exist"),
                "{said}"
            );
        }
        assert_eq!(lab.rules(), rules);
    });
}

/// A disk that is full, read-only, or fails to write.
#[test]
fn a_disk_that_takes_nothing() {
    both(|lab| {
        sh("mkdir -p disk; mount -t tmpfs -o size=64k,mode=777 disk disk");
        modes(lab, "state.file = /run/disk/state", |rfw, _| {
            ask("PUT /drop/forward/any/1.1.1.1/any/1.1.1.2");
            let refused = |what: &str| {
                let (before, file) = (lab.kept(), lab.read("../disk/state"));
                for request in
                    ["PUT /drop/input/any/2.2.2.2", "DELETE /drop/forward/any/1.1.1.1/any/1.1.1.2"]
                {
                    assert_eq!(ask(request).brief(), "507 state_failed", "{what}");
                }
                let long: String =
                    (0..2000).map(|n| format!("10.0.{}.{}\n", n / 250, n % 250)).collect();
                assert_eq!(list("PUT /drop/input/any", long).brief(), "507 state_failed", "{what}");
                assert_eq!((lab.kept(), lab.read("../disk/state")), (before, file), "{what}");
                assert_eq!(ask("GET /list").status, 200, "{what}");
            };
            let works = |what: &str| {
                assert_eq!(ask("PUT /drop/input/any/2.2.2.2").status, 200, "{what}");
                assert_eq!(ask("DELETE /drop/input/any/2.2.2.2").status, 200, "{what}");
            };
            sh("cat /dev/zero > disk/full || true");
            // The rest of its last page still has room for some lines.
            let fits = |n: u32| {
                let address = format!("4.{}.{}.{}", n / 100, n / 10 % 10, n % 10);
                ask(&format!("PUT /drop/input/any/{address}")).status == 200
            };
            assert!((0..300).any(|n| !fits(n)));
            refused("full");
            sh("rm disk/full");
            works("room again");
            if has_strace("state::a_disk_that_takes_nothing") {
                let tracer = inject(rfw, "fdatasync:error=EIO");
                refused("fdatasync");
                drop(tracer);
                works("it writes again");
                // The record of a refused change does not wait for the next change to be removed.
                let file = lab.read("../disk/state");
                let tracer = inject(rfw, "fdatasync,ftruncate:error=EIO");
                let refused = ask("DELETE /drop/forward/any/1.1.1.1/any/1.1.1.2");
                assert_eq!(refused.brief(), "507 state_failed");
                assert_ne!(lab.read("../disk/state"), file);
                drop(tracer);
                await_true("the record is removed", 3 + SLACK, || {
                    lab.read("../disk/state") == file
                });
            }
            let kept = lab.kept().len();
            rfw.kill();
            lab.reboot();
            // A program that rfw was about to start holds rfw's files until it is executed.
            await_true("the disk becomes read-only", 10, || {
                sh("mount -o remount,ro disk 2>&1 || true").is_empty()
            });
            rfw.restart();
            assert_eq!(lab.kept().len(), kept);
            refused("read-only");
            assert!(lab.log().contains("cannot be compacted: Read-only file system"));
            sh("mount -o remount,rw disk");
            works("writable again");
            rfw.kill();
            sh("rm disk/state");
        });
    });
}

/// As a container may have it: the file can be written, but not replaced.
#[test]
fn a_file_that_is_a_mount_point() {
    once(|lab| {
        lab.write("state", "");
        sh("mount --bind lab/state lab/state");
        lab.configure("local.server\nstate.file = state");
        let (status, said) = lab.rfw("-f rfw.conf --logfile -");
        assert!(
            status == 1 && said.contains("; mount its directory instead of the file."),
            "{said}"
        );
    });
}

#[test]
fn a_change_that_the_kernel_rejects_is_not_kept() {
    both(|lab| {
        lab.stand_in("");
        modes(lab, "state.file = state", |rfw, _| {
            ask("PUT /drop/input/any/1.1.1.1");
            ask("PUT /accept/input/any/1.1.1.0/24");
            ask("PUT /drop/forward/any/8.8.8.8/any/2.2.2.2");
            let before = (lab.read("state"), lab.kept().len());
            lab.stand_in_for_changes("echo no such luck >&2; exit 1");
            for request in [
                "PUT /drop/forward/any/1.1.1.1/any/2.2.2.2?expire=1h",
                "PUT /drop/forward/any/9.9.9.9/any/9.9.9.8",
            ] {
                assert_eq!(ask(request).brief(), "500 iptables_failed");
            }
            assert_eq!(lab.read("state"), before.0);
            lab.stand_in("");
            rfw.kill();
            lab.reboot();
            rfw.restart();
            assert_eq!(lab.kept().len(), before.1);
            sh("rm lab/state");
        });
    });
}

/// Removed or emptied under a running rfw: no change answered with 200 may be lost with it.
#[test]
fn a_file_that_others_change_is_no_longer_used() {
    once(|lab| {
        for what in ["rm", "truncate -s 0", "mv -t /run", "sed -i d"] {
            let mut rfw = lab.start(CONF);
            assert_eq!(ask("PUT /drop/input/any/1.1.1.1").status, 200);
            sh(&format!("{what} lab/state"));
            let answer = ask("PUT /drop/input/any/2.2.2.2");
            assert_eq!(answer.brief(), "507 state_failed", "{what}");
            sh("rm -f lab/state");
            rfw.restart();
            assert_eq!(lines(lab), "+ 0 /drop/input/any/1.1.1.1\n", "{what}");
            drop(rfw);
            lab.reboot();
            sh("rm lab/state");
        }
    });
}

#[test]
fn one_rfw_per_file() {
    once(|lab| {
        let _rfw = lab.start(CONF);
        let program = env!("CARGO_BIN_EXE_rfw");
        let run = format!(
            "cd lab; chown root ../rfw rfw.conf white.list state; \
             unshare -n {program} -f rfw.conf --logfile - 2>&1 || true"
        );
        assert!(sh(&run).contains("state: another rfw uses it"), "{}", sh(&run));
    });
}

#[test]
fn a_file_over_twice_the_list_is_compacted() {
    both(|lab| {
        modes(lab, "state.file = state", |rfw, _| {
            ask("PUT /drop/input/any/1.1.1.1");
            let addresses: String = (0..200).map(|n| format!("10.0.0.{n}\n")).collect();
            for _ in 0..12 {
                assert_eq!(list("PUT /drop/input/eth0", &addresses).status, 200);
                assert_eq!(list("DELETE /drop/input/eth0", &addresses).status, 200);
            }
            // 24 lists of 200 lines; it may have grown since.
            let length = || lab.read("state").len();
            await_true("it is short", 3 + SLACK, || length() < 70_000);
            assert_eq!(fs::metadata(lab.dir.join("state")).unwrap().mode() & 0o777, 0o600);
            assert!(!lab.dir.join("state.new").exists());
            // The new file is locked, and written to.
            let run = format!(
                "cd lab; chown root ../rfw rfw.conf white.list state; \
                 unshare -n {} -f rfw.conf --logfile - 2>&1 || true",
                env!("CARGO_BIN_EXE_rfw")
            );
            assert!(sh(&run).contains("another rfw uses it"));
            ask("PUT /drop/input/any/3.3.3.3");
            rfw.kill();
            lab.reboot();
            rfw.restart();
            assert_eq!(lab.kept().into_keys().collect::<Vec<_>>(), ["1.1.1.1", "3.3.3.3"]);
            sh("rm lab/state");
        });
    });
}

/// A router boots in 1970 with yesterday's list, and then queries NTP.
#[test]
fn setting_the_clock_moves_the_expiries_in_the_file() {
    both(|lab| {
        lab.write("clock.c", CLOCK);
        sh("cd lab; cc -shared -fPIC -w -o clock.so clock.c");
        for sets in ["", SETS] {
            let born = now();
            lab.write("jump", &format!("-{born}"));
            state(lab, &format!("+ {} /drop/input/any/1.1.1.1\n", born + 3600));
            lab.configure(&format!("{CONF}\n{sets}"));
            let mut rfw = lab.launch(&["env", "LD_PRELOAD=/run/lab/clock.so"]);
            rfw.await_ready();
            ask("PUT /drop/input/any/2.2.2.2?expire=1h");
            lab.write("jump", "0");
            await_true("the file follows", 4 + SLACK, || {
                let times = lines(lab)
                    .lines()
                    .map(|line| line.split(' ').nth(1).unwrap().parse().unwrap())
                    .collect::<Vec<u64>>();
                times.len() == 2 && times.iter().all(|time| time.abs_diff(born + 3600) < 30)
            });
            await_true("the kernel too", 4 + SLACK, || {
                let kept = lab.kept();
                kept.len() == 2
                    && kept.values().all(|time| time.is_some_and(|t| t.abs_diff(born + 3600) < 30))
            });
            drop(rfw);
            lab.reboot();
        }
    });
}

/// The directory cannot be synced after the rename: later lines go to the file that has the name.
#[test]
fn a_directory_that_fails_behind_a_compaction() {
    if !has_strace("state::a_directory_that_fails_behind_a_compaction") {
        return;
    }
    once(|lab| {
        let mut rfw = lab.start(CONF);
        let tracer = inject(&rfw, "fsync:error=EIO:when=2");
        // 12 lists of 200 lines exceed 64 KiB.
        let addresses: String = (0..200).map(|n| format!("10.0.0.{n}\n")).collect();
        for _ in 0..6 {
            assert_eq!(list("PUT /drop/input/eth0", &addresses).status, 200);
            assert_eq!(list("DELETE /drop/input/eth0", &addresses).status, 200);
        }
        let has_failed = || lab.read("rfw.log").contains("cannot be compacted");
        await_true("a compaction fails", 5 + SLACK, has_failed);
        drop(tracer);
        ask("PUT /drop/input/any/3.3.3.3");
        rfw.kill();
        lab.reboot();
        rfw.restart();
        assert_eq!(lab.kept().into_keys().collect::<Vec<_>>(), ["3.3.3.3"]);
    });
}

/// The clock is set while the outcome of a list is unknown.
#[test]
fn the_clock_is_set_after_a_list_that_failed() {
    once(|lab| {
        lab.write("clock.c", CLOCK);
        sh("cd lab; cc -shared -fPIC -w -o clock.so clock.c");
        lab.write("jump", "0");
        lab.stand_in("");
        let put = |expires: u64| format!("+ {expires} /drop/input/any/1.1.1.1\n");
        let expires = now() + 36_000;
        state(lab, &format!("- /drop/input/any/2.2.2.2\n{}", put(expires)));
        lab.configure(&format!("{CONF}\n{}", SETS.replace("/usr/sbin", "/run/lab/bin")));
        let mut rfw = lab.launch(&["env", "LD_PRELOAD=/run/lab/clock.so"]);
        rfw.await_ready();
        lab.stand_in("[ $me != ipset ] || kill -9 $$");
        let many: String = (1..9).map(|n| format!("10.0.0.{n}\n")).collect();
        assert_eq!(list("PUT /drop/input/any", many).status, 503);
        lab.write("jump", "3600");
        let noticed = || lab.read("rfw.log").contains(" WARNING the clock changed by 3");
        await_true("rfw notices it", 3 + SLACK, noticed);
        lab.stand_in("");
        await_true("the list is settled", 12 + SLACK, || {
            ask("PUT /drop/input/any/5.5.5.5").status == 200
        });
        let moved = || (3599..=3602).any(|step| lines(lab).contains(&put(expires + step)));
        await_true("the file follows", 4 + SLACK, moved);
        rfw.kill();
        let file = lines(lab);
        assert!(file.lines().count() == 2 && !file.contains("10.0.0."), "{file}");
        assert_eq!(lab.rfw("-t -f /run/lab/rfw.conf").0, 0, "{file}");
    });
}

/// Without sets, an address may have two targets, and the newer rule wins.
#[test]
fn the_newer_of_two_targets_moves_into_the_sets() {
    both(|lab| {
        let (drop_it, accept_it) = ("/drop/input/any/1.1.1.1", "/accept/input/any/1.1.1.1");
        lab.configure(&format!("{CONF}\n{SETS}"));
        for (older, newer) in [(drop_it, accept_it), (accept_it, drop_it)] {
            state(lab, &format!("+ 0 {older}\n+ 0 {newer}\n"));
            let mut rfw = lab.launch(&[]);
            rfw.await_ready();
            let listed = ask("GET /list").body;
            let target = newer.split('/').nth(1).unwrap().to_uppercase();
            assert!(listed.contains(&target) && listed.matches("1.1.1.1").count() == 1, "{listed}");
            // The file does not restore it either.
            assert_eq!(ask(&format!("DELETE {newer}")).brief(), "200 deleted");
            rfw.kill();
            lab.reboot();
            rfw.restart();
            assert_eq!(ask("GET /list").body, "[]\n");
            drop(rfw);
        }
    });
}
