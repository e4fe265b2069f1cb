//! What rfw does to the real kernel, and how it copes with an iptables that fails.

use crate::lab::*;
use crate::tls;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

const DAY: u64 = 86_400;

/// Other people's rules, some of them close to rfw's own.
const OTHERS: [&str; 12] = [
    "-N rfw",
    "-A rfw -s 1.2.3.4 -m comment --comment hers -j RETURN",
    "-A INPUT -s 9.9.9.9 -j DROP",
    "-A INPUT -p tcp --dport 22 -m comment --comment rfw -j ACCEPT",
    "-A INPUT -s 1.2.3.4 -m comment --comment rfwall -j DROP",
    "-A INPUT -s 1.2.3.4 -m comment --comment \"rfw: his\" -j DROP",
    "-A INPUT -s 1.2.3.4 -m comment --comment rfw:12x -j DROP",
    "-A INPUT -s 1.2.3.4 ! -i lo -m comment --comment \"-j DROP --comment rfw\" -j rfw",
    "-A INPUT -s 1.2.3.4 -g rfw",
    "-A FORWARD -d 5.6.7.0/24 -p udp -m udp --sport 53 -j ACCEPT",
    "-P FORWARD DROP",
    "-t nat -A POSTROUTING -s 10.0.0.0/8 -m comment --comment rfw -j RETURN",
];

#[test]
fn others_rules_are_never_touched() {
    both(|lab| {
        OTHERS.iter().for_each(|rule| drop(lab.iptables(rule)));
        lab.ip6tables("-A INPUT -s 2001:db8::9 -j DROP");
        let all = || (lab.others(), lab.iptables("-t nat -S"));
        let before = all();
        let mut rfw = lab.start("local.server");
        transcript(&[
            ("DELETE /drop/input/any/9.9.9.9", "200 absent"),
            ("DELETE /drop/input/any/2001:db8::9", "200 absent"),
            ("DELETE /drop/input/any/1.2.3.4", "200 absent"),
            ("PUT /drop/input/any/9.9.9.9", "200 inserted"),
            ("PUT /drop/input/any/2001:db8::9", "200 inserted"),
            ("PUT /drop/input/any/9.9.9.9?expire=1h", "200 refreshed"),
            ("PUT /accept/forward/any/5.6.7.8", "200 inserted"),
            ("PUT /drop/input/any/8.8.8.8?expire=1", "200 inserted"),
        ]);
        assert_eq!(all(), before);
        await_true("an expiry", 3 + SLACK, || lab.rules().len() == 3);
        rfw.restart();
        assert_eq!(ask("DELETE /drop/input/any/9.9.9.9").brief(), "200 deleted");
        assert_eq!(ask("GET /list/input").body.matches("source").count(), 1);
        assert_eq!(all(), before);
    });
}

#[test]
fn a_newer_rule_comes_first() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let [drop, accept] = ["drop", "accept"].map(|t| format!("PUT /{t}/input/any/1.2.3.4"));
        let wide = "PUT /accept/input/any/1.2.0.0/16".to_string();
        let [d, a] = ["DROP", "ACCEPT"].map(|t| format!("INPUT -s 1.2.3.4/32 -j {t} [rfw]"));
        let w = "INPUT -s 1.2.0.0/16 -j ACCEPT [rfw]".to_string();
        let steps = [
            (&drop, "200 inserted", vec![&d]),
            (&accept, "200 inserted", vec![&a, &d]),
            (&accept, "200 exists", vec![&a, &d]),
            (&drop, "200 refreshed", vec![&d, &a]),
            (&drop, "200 exists", vec![&d, &a]),
            (&wide, "200 inserted", vec![&w, &d, &a]),
            (&accept, "200 refreshed", vec![&a, &w, &d]),
            (&drop, "200 refreshed", vec![&d, &a, &w]),
        ];
        for (request, answer, rules) in steps {
            assert_eq!(ask(request).brief(), answer, "{request}");
            assert_eq!(lab.rules().iter().collect::<Vec<_>>(), rules, "{request}");
        }
    });
}

#[test]
fn a_refresh_moves_to_the_front() {
    both(|lab| {
        let mut rfw = lab.start("local.server");
        ["1.1.1.1", "2.2.2.2", "2001:db8::1"].iter().for_each(|ip| {
            ask(&format!("PUT /drop/input/any/{ip}"));
        });
        let first = ask("PUT /drop/input/any/1.1.1.1?expire=1h");
        let six = ask("PUT /drop/input/any/2001:db8::1?expire=1h");
        let rules = [
            format!("INPUT -s 1.1.1.1/32 -j DROP [rfw:{}]", first.expires()),
            "INPUT -s 2.2.2.2/32 -j DROP [rfw]".into(),
            format!("INPUT -s 2001:db8::1/128 -j DROP [rfw:{}]", six.expires()),
        ];
        assert_eq!(lab.rules(), rules);
        rfw.restart();
        assert_eq!(lab.rules(), rules);
        assert_eq!(ask("PUT /drop/input/any/1.1.1.1?expire=0").brief(), "200 refreshed");
        assert_eq!(ask("PUT /drop/input/any/2.2.2.2").brief(), "200 exists");
    });
}

/// ip6tables-nft does not compare the lengths of prefixes: it deletes the first rule with the address.
#[test]
fn a_delete_of_an_ipv6_block_deleted_a_smaller_one_with_the_same_address() {
    both(|lab| {
        let mut rfw = lab.start("local.server");
        let blocks = [64, 48, 40, 32].map(|length| format!("2001:db8::/{length}"));
        let held = |blocks: &[String]| -> Vec<String> {
            blocks.iter().map(|block| format!("INPUT -s {block} -j DROP [rfw]")).collect()
        };
        for block in blocks.iter().rev() {
            let put = format!("PUT /drop/input/any/{block}");
            assert_eq!(ask(&put).brief(), "200 inserted");
        }
        assert_eq!(lab.rules(), held(&blocks));
        assert_eq!(ask("DELETE /drop/input/any/2001:db8::/40").brief(), "200 deleted");
        let left = [64, 48, 32].map(|length| format!("2001:db8::/{length}"));
        assert_eq!(lab.rules(), held(&left));
        rfw.restart();
        assert_eq!(lab.rules(), held(&left));
        assert_eq!(ask("PUT /drop/input/any/2001:db8::/48?expire=1h").brief(), "200 refreshed");
        let rules: Vec<_> = lab.rules().iter().map(|rule| rule.contains("/48")).collect();
        assert_eq!(rules, [true, false, false]);
        assert!(!lab.log().contains(" WARNING "), "{}", lab.log());
    });
}

#[test]
fn expiry() {
    both(|lab| {
        let _rfw = lab.start("local.server\ndefault.expire = 3");
        let start = ask("PUT /drop/input/any/1.1.1.1").expires();
        transcript(&[
            ("PUT /drop/input/any/2.2.2.2?expire=3", "200 inserted"),
            ("PUT /drop/output/any/2001:db8::2?expire=3", "200 inserted"),
            ("PUT /drop/input/any/3.3.3.3?expire=0", "200 inserted"),
            ("PUT /drop/input/any/4.4.4.4?expire=3", "200 inserted"),
            ("PUT /drop/input/any/4.4.4.4?expire=0", "200 refreshed"),
            ("PUT /drop/input/any/5.5.5.5?expire=1h", "200 inserted"),
            ("PUT /drop/input/any/5.5.5.5?expire=3", "200 refreshed"),
        ]);
        await_true("four rules expire", 6 + SLACK, || {
            let count = lab.rules().len();
            assert!(count == 6 || now() >= start, "early");
            count == 2
        });
        let left = ["INPUT -s 4.4.4.4/32 -j DROP [rfw]", "INPUT -s 3.3.3.3/32 -j DROP [rfw]"];
        assert_eq!(lab.rules(), left);
        let expired = " INFO expired /drop/input/any/2.2.2.2\n";
        await_true("a line in the log", SLACK, || lab.read("rfw.log").contains(expired));
    });
}

#[test]
fn a_flush_and_a_hand_deleted_rule_come_back_in_order() {
    both(|lab| {
        let count = lab.seed(1000, &format!("rfw:{}", now() + DAY));
        let _rfw = lab.start("local.server");
        assert_eq!(ask("DELETE /drop/input/any/10.0.7.1").brief(), "200 deleted");
        ask("PUT /drop/input/any/2001:db8::1");
        lab.iptables("-I INPUT 3 -s 9.9.9.9 -j DROP");
        let (rules, others) = (lab.rules(), lab.others());
        assert_eq!(rules.len(), count);

        lab.iptables("-D INPUT 201");
        lab.iptables("-D INPUT 1");
        await_repair("two rules come back", 3 + SLACK, || lab.rules() == rules);
        assert_eq!(lab.others(), others);
        let warning = " WARNING restored rules ";
        await_true("a warning", SLACK, || lab.read("rfw.log").contains(warning));

        lab.iptables("-F");
        lab.ip6tables("-F");
        await_repair("a thousand rules come back", 3 + SLACK, || lab.rules() == rules);
        assert_eq!(ask("GET /list").body.matches("source").count(), count);
        assert!(!lab.rules().iter().any(|rule| rule.contains("10.0.7.1/")));
    });
}

#[test]
fn a_tagged_rule_that_no_request_made_is_removed() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        assert_eq!(ask("PUT /drop/input/any/3.3.3.3").status, 200);
        lab.iptables("-A INPUT -s 1.1.1.1 -m comment --comment rfw:4102444800 -j DROP");
        lab.iptables("-I INPUT -s 2.2.2.2 -m comment --comment rfw -j DROP");
        await_repair("they are removed", 3 + SLACK, || lab.rules().len() == 1);
        assert_eq!(lab.rules(), ["INPUT -s 3.3.3.3/32 -j DROP [rfw]"]);
        transcript(&[("PUT /drop/input/any/2.2.2.2", "200 inserted")]);
    });
}

#[test]
fn at_start_the_kernel_is_the_list() {
    both(|lab| {
        let day = now() + DAY;
        let rows = [
            ("1.1.1.1", format!("rfw:{}", now() - 5), "expired"),
            ("2.2.2.2", format!("rfw:{day}"), ""),
            ("3.3.3.3", format!("rfw:{}", day + 9), ""),
            ("192.0.2.0/24", "rfw".into(), "whitelisted now"),
            ("3.3.3.3", format!("rfw:{day}"), "older than the one that stands before it"),
            ("4.4.4.4", "rfw".into(), ""),
        ];
        for (ip, tag, _) in &rows {
            lab.iptables(&format!("-A INPUT -s {ip} -m comment --comment {tag} -j DROP"));
        }
        let _rfw = lab.start("local.server");
        assert_eq!(ask("GET /list").body.matches("source").count(), 3);
        let stays = rows.iter().filter(|(_, _, why_not)| why_not.is_empty());
        let rule =
            |(ip, tag, _): &(&str, String, &str)| format!("INPUT -s {ip}/32 -j DROP [{tag}]");
        assert_eq!(lab.rules(), stays.map(rule).collect::<Vec<_>>());
        let log = lab.log();
        let warned = |line: &str| line.contains(" WARNING ") && line.contains("192.0.2.0/24");
        assert!(log.lines().any(warned), "{log}");
    });
}

/// Changes the time of day that rfw sees: it reads the offset from /run/lab/jump.
pub const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *t) {
    long result = syscall(SYS_clock_gettime, clock, t), jump = 0;
    FILE *file = clock == CLOCK_REALTIME ? fopen("/run/lab/jump", "r") : NULL;
    if (file) { fscanf(file, "%ld", &jump); fclose(file); t->tv_sec += jump; }
    return result;
}
"#;

#[test]
fn a_jump_of_the_clock_expires_nothing_early_or_late() {
    both(|lab| {
        lab.write("clock.c", CLOCK);
        sh("cd lab; cc -shared -fPIC -w -o clock.so clock.c");
        let born = now();
        lab.write("jump", &format!("-{born}")); // a router boots in 1970
        lab.configure("local.server");
        let mut rfw = lab.launch(&["env", "LD_PRELOAD=/run/lab/clock.so"]);
        rfw.await_ready();
        let day = ask("PUT /drop/input/any/1.1.1.1?expire=1d").expires();
        assert!(day < DAY + 60, "the clock of the test does not work");
        let from = Instant::now();
        ask("PUT /drop/input/any/2.2.2.2?expire=6");
        let stamped = |time: u64, rule: &String| {
            let stamp: u64 = rule.split(['[', ':', ']']).nth(2).unwrap().parse().unwrap();
            stamp.abs_diff(time) <= 3
        };
        lab.write("jump", "0"); // and asks NTP
        await_true("the comment has the new expiry", 3 + SLACK, || {
            let rules = lab.rules();
            assert!(
                rules.len() == 2 || from.elapsed() >= Duration::from_secs(5),
                "early: {rules:?}"
            );
            stamped(born + day, rules.last().unwrap())
        });
        lab.write("jump", "-100000");
        await_true("a rule expires", 6 + SLACK, || lab.rules().len() == 1);
        assert!(from.elapsed() >= Duration::from_secs(5), "early");
        await_true("stamped once more", 3 + SLACK, || {
            stamped(born + day - 100_000, &lab.rules()[0])
        });
        assert_eq!(ask("PUT /drop/input/any/1.1.1.1").brief(), "200 refreshed");
    });
}

/// The ticker counted its seconds from the start of rfw: with 5,000 rules, some expired 2.3 s late.
#[test]
fn rules_expire_when_a_second_begins() {
    once(|lab| {
        let part = || SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_millis();
        for started in [0, 300, 600] {
            await_true("the part of a second", 2, || (started..started + 100).contains(&part()));
            let _rfw = lab.start("local.server");
            let is_in_time = |_| {
                await_time(ask("PUT /drop/input/any/1.2.3.4?expire=1").expires());
                await_true("the rule expires", 2 + SLACK, || lab.rules().is_empty());
                part() < 300
            };
            assert!((0..10).any(is_in_time), "started at {started} ms");
        }
    });
}

/// The guard rules for these whitelist entries: in INPUT and OUTPUT, ACCEPT for each, then DROP.
fn guards_of(ranges: &[&str]) -> Vec<String> {
    let of = |chain, way, port| {
        let accept = ranges.iter().map(move |net| {
            format!("{chain} {way} {net} -p tcp {port} 7393 -j ACCEPT [rfw:guard]")
        });
        accept.chain([format!("{chain} -p tcp {port} 7393 -j DROP [rfw:guard]")])
    };
    of("INPUT", "-s", "--dport").chain(of("OUTPUT", "-d", "--sport")).collect()
}

/// The guards by chain: the DROP is last, the ACCEPTs before it are in any order.
fn chains(guards: &[String]) -> Vec<Vec<String>> {
    let chains = guards.split_inclusive(|rule| rule.contains("-j DROP"));
    let mut chains: Vec<Vec<String>> = chains.map(<[String]>::to_vec).collect();
    chains.iter_mut().for_each(|chain| chain.sort());
    chains
}

#[test]
fn guard_rules() {
    both(|lab| {
        tls::keys(lab);
        let list = "192.0.2.1\n10.0.0.0/8\n198.51.100.4-198.51.100.7\n2001:db8::/48\n";
        lab.write("white.list", list);
        let mut rfw = lab.start(&format!("local.server\n{}", tls::CONF));
        let four = guards_of(&["10.0.0.0/8", "127.0.0.0/8", "192.0.2.1/32", "198.51.100.4/30"]);
        let six = guards_of(&["2001:db8::/48", "::1/128"]);
        let whole = chains(&[four, six].concat());
        assert_eq!(chains(&lab.guards()), whole);
        assert_eq!(ask("GET /list").body, "[]\n");

        // They are never missing or duplicated while rfw is restarted again and again.
        let done = std::sync::atomic::AtomicBool::new(false);
        let order = std::sync::atomic::Ordering::SeqCst;
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(order) {
                    assert_eq!(chains(&lab.guards()), whole);
                }
            });
            (0..5).for_each(|_| rfw.restart());
            done.store(true, order);
        });
        lab.iptables("-F");
        lab.ip6tables("-D INPUT 1");
        await_repair("the guards come back", 3 + SLACK, || chains(&lab.guards()) == whole);

        lab.write("white.list", "192.0.2.1\n");
        rfw.restart();
        let whole = [guards_of(&["127.0.0.0/8", "192.0.2.1/32"]), guards_of(&["::1/128"])].concat();
        assert_eq!(chains(&lab.guards()), chains(&whole));
    });
}

#[test]
fn the_exact_commands() {
    both(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        lab.stand_in_for_changes("echo \"$me $*\" >> $lab/calls");
        let tail = "-m comment --comment rfw -j";
        let rows = [
            ("/drop/input/eth0/11.22.33.44", format!("INPUT -i eth0 -s 11.22.33.44 {tail} DROP")),
            ("/reject/input/any/7.7.7.77/24", format!("INPUT -s 7.7.7.0/24 {tail} REJECT")),
            ("/accept/output/ppp/1.2.3.4", format!("OUTPUT -o ppp+ -d 1.2.3.4 {tail} ACCEPT")),
            (
                "/drop/forward/eth0/1.2.3.4/eth1/5.6.7.8",
                format!("FORWARD -i eth0 -o eth1 -s 1.2.3.4 -d 5.6.7.8 {tail} DROP"),
            ),
        ];
        for (path, words) in rows {
            ask(&format!("PUT {path}"));
            ask(&format!("DELETE {path}"));
            let calls = format!("iptables -w 5 -I {words}\niptables -w 5 -D {words}\n");
            assert_eq!(lab.read("calls"), calls, "{path}");
            lab.write_data("calls", "");
        }
        let timed = ask("PUT /drop/input/any/2001:db8::1?expire=1h").expires();
        let words = format!("INPUT -s 2001:db8::1 -m comment --comment rfw:{timed} -j DROP");
        assert_eq!(lab.read("calls"), format!("ip6tables -w 5 -I {words}\n"));
    });
}

/// While `$lab/gate` exists, changes wait; restores record their input.
const GATE: &str = r#"
n=0
while [ -e $lab/gate ] && [ $((n += 1)) -lt 1500 ]; do /bin/sleep 0.02; done
case $me in
    *-restore) echo "$me $*" >> $lab/calls; /usr/bin/tee -a $lab/calls | INPUT "$@"; exit $?;;
esac"#;

/// Sends these PUTs while the first one waits, so that they become one batch.
fn batch(lab: &Lab, rfw: &Rfw, first: &str, requests: &[String]) -> Vec<String> {
    lab.write("gate", "");
    let before = rfw.await_idle();
    let send = |request: &str| {
        let mut conn = Conn::open();
        conn.send(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        conn
    };
    let come = |count| {
        await_true("rfw accepts them", 10 + SLACK, || rfw.threads() == before + count);
        rfw.await_queued();
    };
    let mut first = send(first);
    come(1);
    let mut rest: Vec<_> = requests.iter().map(|request| send(request)).collect();
    come(1 + requests.len());
    std::fs::remove_file(lab.dir.join("gate")).unwrap();
    assert_eq!(first.answer().unwrap().brief(), "200 inserted");
    rest.iter_mut().map(|conn| conn.answer().unwrap().brief()).collect()
}

#[test]
fn waiting_requests_become_one_restore_per_family() {
    both(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        lab.stand_in_for_changes(&GATE.replace("INPUT", "$real"));
        let put = |n| format!("PUT /drop/input/any/1.1.2.{n}");
        let mut requests: Vec<_> = (1..=8).map(put).collect();
        requests.extend((1..=4).map(|n| format!("PUT /drop/output/any/2001:db8::{n}")));
        let answers = batch(lab, &rfw, "PUT /drop/input/any/1.1.1.1", &requests);
        assert!(answers.iter().all(|answer| answer == "200 inserted"));
        let calls = lab.read("calls");
        let mut restores: Vec<_> = calls.lines().filter(|line| line.contains("restore ")).collect();
        restores.sort_unstable();
        assert_eq!(
            restores,
            ["ip6tables-restore --noflush -w 5", "iptables-restore --noflush -w 5"]
        );
        assert_eq!(calls.lines().filter(|line| line.starts_with("-I ")).count(), 12, "{calls}");
        assert_eq!(lab.rules().len(), 13);
    });
}

#[test]
fn a_rule_that_the_kernel_rejects_fails_alone() {
    both(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        // The kernel itself rejects it: 1.1.2.5 names a chain that does not exist.
        let spoil = "/bin/sed '/1.1.2.5/s/DROP/NOCHAIN/' | $real";
        let single = "case $* in *1.1.2.5*) exec $real -I INPUT -s 1.1.2.5 -j NOCHAIN;; esac";
        lab.stand_in_for_changes(&format!("{}\n{single}", GATE.replace("INPUT", spoil)));
        let requests: Vec<_> = (1..=8).map(|n| format!("PUT /drop/input/any/1.1.2.{n}")).collect();
        let mut want = ["200 inserted"; 8];
        want[4] = "500 iptables_failed";
        assert_eq!(batch(lab, &rfw, "PUT /drop/input/any/1.1.1.1", &requests), want);
        let rules = lab.rules();
        assert_eq!(rules.len(), 8, "{rules:#?}");
        assert!(!rules.iter().any(|rule| rule.contains("1.1.2.5/")));
        let answer = ask("PUT /drop/input/any/1.1.2.5");
        assert!(answer.field("message").contains("NOCHAIN"), "{answer:?}");
        await_true("nothing is put back", 2, || {
            ask("PUT /drop/input/any/1.1.2.6").brief() == "200 exists"
        });
    });
}

#[test]
fn a_batch_keeps_the_order_of_its_requests() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let mut conn = Conn::open();
        let requests = ["PUT /drop", "PUT /accept", "PUT /drop", "DELETE /accept", "PUT /accept"];
        let head = " HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let all: String = requests.iter().map(|r| format!("{r}/input/any/1.2.3.4{head}")).collect();
        conn.send(all);
        let answers: Vec<_> = requests.iter().map(|_| conn.answer().unwrap().brief()).collect();
        assert_eq!(
            answers,
            ["200 inserted", "200 inserted", "200 refreshed", "200 deleted", "200 inserted"]
        );
        let rules = ["INPUT -s 1.2.3.4/32 -j ACCEPT [rfw]", "INPUT -s 1.2.3.4/32 -j DROP [rfw]"];
        assert_eq!(lab.rules(), rules);
    });
}

const HELD: &str = "echo 'Another app is currently holding the xtables lock.' >&2; exit 4";

/// What iptables does instead of a change; the response; a part of its message.
const FAULTS: [(&str, &str, &str); 8] = [
    ("echo 'iptables: Bad luck.' >&2; exit 1", "500 iptables_failed", "Bad luck."),
    ("echo 'iptables: Memory \"x\\' >&2; exit 2", "500 iptables_failed", "Memory"),
    ("exit 3", "500 iptables_failed", ""),
    (HELD, "503 busy", ""),
    ("exit 4", "503 busy", ""),
    ("kill -9 $$", "503 busy", ""),
    ("/bin/cat < /dev/zero | /usr/bin/head -c 9000000 >&2; exit 1", "500 iptables_failed", ""),
    ("exec /bin/sleep 100", "503 busy", ""),
];

#[test]
fn an_iptables_that_fails() {
    both(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        assert_eq!(ask("PUT /drop/input/any/9.9.9.9").brief(), "200 inserted");
        let rules = lab.rules();
        for (fault, brief, words) in FAULTS {
            lab.stand_in_for_changes(fault);
            let from = Instant::now();
            for request in ["PUT /drop/input/any/1.2.3.4", "DELETE /drop/input/any/9.9.9.9"] {
                if fault.contains("sleep") && request.starts_with("DELETE") {
                    continue; // once is long enough
                }
                let answer = ask(request);
                assert_eq!(answer.brief(), brief, "{fault} {request} {answer:?}");
                assert!(answer.field("message").contains(words), "{fault}: {answer:?}");
                assert_eq!(
                    answer.header("Retry-After").is_some(),
                    answer.status == 503,
                    "{answer:?}"
                );
                assert_eq!(lab.rules(), rules, "{fault} {request}");
            }
            assert!(from.elapsed().as_secs() <= 11 + SLACK, "{fault}: {:?}", from.elapsed());
            lab.stand_in("");
            transcript(&[
                ("PUT /drop/input/any/1.2.3.4", "200 inserted"),
                ("DELETE /drop/input/any/1.2.3.4", "200 deleted"),
            ]);
        }
    });
}

#[test]
fn an_iptables_that_cannot_be_started_or_read() {
    once(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        for (fault, brief) in [("exit 1", "500 iptables_failed"), ("kill -9 $$", "503 busy")] {
            lab.stand_in(fault);
            assert_eq!(ask("GET /list").brief(), brief, "{fault}");
        }
        sh("chmod -x lab/bin/*");
        let put = "PUT /drop/input/any/1.2.3.4";
        transcript(&[(put, "503 busy"), ("GET /list", "503 busy"), ("GET /", "200")]);
        lab.stand_in("");
        transcript(&[(put, "200 inserted"), ("GET /list", "200")]);
    });
}

#[test]
fn an_iptables_that_prints_noise() {
    both(|lab| {
        let noise = "echo '# Warning: iptables-legacy tables present'; echo noise >&2";
        lab.stand_in(noise);
        let _rfw = lab.start("local.server");
        transcript(&[
            ("PUT /drop/input/any/1.2.3.4", "200 inserted"),
            ("PUT /drop/input/any/1.2.3.4?expire=1h", "200 refreshed"),
            ("GET /list", "200"),
        ]);
        assert_eq!(ask("GET /list").body.matches("source").count(), 1);
        assert_eq!(lab.rules().len(), 1);
    });
}

#[test]
fn a_held_xtables_lock_gives_503() {
    legacy(|lab| {
        let _rfw = lab.start("local.server");
        let holder = Process::start("flock -F /run/xtables.lock sleep 100");
        let held = || sh("flock -n /run/xtables.lock true && echo free || echo held") == "held\n";
        await_true("the lock is held", SLACK, held);
        let from = Instant::now();
        let answer = ask("PUT /drop/input/any/1.2.3.4");
        assert_eq!(answer.brief(), "503 busy", "{answer:?}");
        assert!((4..=11 + SLACK).contains(&from.elapsed().as_secs()), "{:?}", from.elapsed());
        drop(holder);
        transcript(&[("PUT /drop/input/any/1.2.3.4", "200 inserted")]);
    });
}

#[test]
fn without_ip6tables_or_ipv6_ipv4_works() {
    once(|lab| {
        sh("ip addr add 198.18.0.1/32 dev lo");
        // As /proc looks if the kernel has no IPv6.
        let proc = "mount -t tmpfs proc /proc; mkdir -p /proc/self/net; touch /proc/self/net/dev; exec \"$0\" \"$@\"";
        for prefix in [&[][..], &["unshare", "-m", "/bin/sh", "-c", proc]] {
            lab.stand_in("");
            if prefix.is_empty() {
                sh("rm lab/bin/ip6*");
            }
            lab.write("rfw.log", "");
            lab.configure("local.server");
            if prefix.is_empty() {
                let (status, output) = lab.rfw("-t -f rfw.conf");
                assert_eq!(status, 0, "{output}");
                assert!(output.contains("WARNING: IPv6 rules are not accepted: "), "{output}");
            }
            let mut rfw = lab.launch(prefix);
            rfw.await_ready();
            assert_eq!(ask("PUT /drop/input/any/2001:db8::1").status, 400);
            assert_eq!(ask("PUT /drop/input/any/1.2.3.4").status, 200);
            let lines = "1.2.3.4\n2001:db8::1\n5.6.7.8\n2001:db8::/64\n";
            let answer = list("PUT /drop/input/any", lines);
            assert_eq!(answer.sums(), "inserted 1 exists 1");
            assert_eq!(answer.field("ipv6_skipped"), "2");
            assert_eq!(list("PUT /drop/input/any", "::2\nx\n").sums(), "400 bad_list 2");
            let answer = list("DELETE /drop/input/any", "::2\n");
            assert_eq!((answer.sums(), answer.field("ipv6_skipped")), ("".into(), "1"));
            assert_eq!(ask("GET /list").body.matches("source").count(), 2);
            assert_eq!(list("DELETE /drop/input/any", "5.6.7.8").sums(), "deleted 1");
            // Without a file of own addresses, a socket still shows whether an address is one.
            assert_eq!(ask("PUT /drop/input/any/198.18.0.1").brief(), "409 whitelisted");
            // With this, one can be bound to any address.
            sh("echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind");
            assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 exists");
            assert_eq!(
                ask("PUT /drop/input/any/198.18.0.1").status,
                if prefix.is_empty() { 409 } else { 200 }
            );
            sh("echo 0 > /proc/sys/net/ipv4/ip_nonlocal_bind");
            let log = lab.log();
            let count = |what: &str| log.matches(what).count();
            assert_eq!(count(" WARNING IPv6 rules are not accepted"), 1, "{log}");
            // At the start, for each list, and for each address that a socket can be bound to.
            let unlisted = if prefix.is_empty() { 0 } else { 8 };
            assert_eq!(count(" WARNING cannot list all of this host's addresses"), unlisted);
            assert_eq!(count(" WARNING "), 1 + unlisted, "{log}");
        }
        // An ip6tables that fails is different: IPv6 would be open.
        lab.stand_in(
            "case $me in ip6*) echo \"can't initialize ip6tables table\" >&2; exit 3;; esac",
        );
        let (status, output) = lab.rfw("-f rfw.conf --logfile -");
        assert!(status == 1 && output.contains("can't initialize ip6tables"), "{output}");
        for (damage, message) in [
            ("rm lab/bin/ip6tables-restore", "bin/ip6tables-restore: No such file"),
            ("chmod 644 lab/bin/ip6tables", "bin/ip6tables is not an executable file"),
            (
                "chmod 757 lab/bin/ip6tables",
                "bin/ip6tables: other users can write to it; run chmod go-w",
            ),
        ] {
            lab.stand_in("");
            sh(damage);
            for arguments in ["-t -f rfw.conf", "-f rfw.conf --logfile -"] {
                let (status, output) = lab.rfw(arguments);
                assert!(status == 1 && output.contains(message), "{damage}: {output}");
            }
        }
    });
}

/// Each check has time for one hanging program, and the next check starts with another.
#[test]
fn an_iptables_that_hangs_does_not_keep_ipv6_from_being_repaired() {
    once(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        assert_eq!(ask("PUT /drop/input/any/2001:db8::1").status, 200);
        lab.stand_in("case $me in iptables*) exec /bin/sleep 60;; esac");
        lab.ip6tables("-F");
        await_true("IPv6 is repaired", 60 + SLACK, || lab.rules().len() == 1);
    });
}

/// In a rootless container, iptables-nft takes some 380 rules per transaction. Those that had been
/// inserted one by one were lost after a flush or a reboot, and rfw did not start any more.
#[test]
fn a_rootless_container_keeps_all_rules() {
    once(|lab| {
        let records: String = (0..1000)
            .map(|n| format!("+ 0 /drop/input/any/10.0.{}.{}\n", n / 250, n % 250))
            .collect();
        lab.write("state", &format!("rfw state 2\n{records}"));
        lab.write("list", &records.replace("+ 0 /drop/input/any/10.0", "10.1"));
        lab.configure("local.server\nstate.file = state");
        let (rfw, iptables) = (env!("CARGO_BIN_EXE_rfw"), lab.real("iptables"));
        lab.write(
            "script",
            &format!(
                "ip link set lo up
                 await() {{ until [ $({iptables} -S INPUT | grep -c rfw) = $1 ]; do sleep 0.1; done; }}
                 {rfw} -f rfw.conf --logfile - 2> log &
                 trap 'kill $!' EXIT
                 await 1000
                 {iptables} -F
                 await 1000
                 curl -s --retry 9 --retry-connrefused -T list http://127.0.0.1:7390/drop/input/any
                 await 2000"
            ),
        );
        let said = sh("cd lab; timeout 60 unshare -rn sh -e script || cat log");
        assert!(said.contains("\"inserted\":1000"), "{said}");
    });
}

#[test]
fn children_have_an_empty_environment() {
    once(|lab| {
        lab.stand_in("/usr/bin/tr '\\0' '\\n' < /proc/$$/environ >> $lab/environ");
        let _rfw = lab.start("local.server");
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 inserted");
        assert_eq!(lab.read("environ"), "");
    });
}

/// A batch of over 64 deletions is written differently, and also moves the rules that stay.
#[test]
fn a_large_batch_of_refreshed_rules_moves_them_all_to_the_front() {
    both(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        lab.stand_in_for_changes(&GATE.replace("INPUT", "$real"));
        let puts: Vec<_> = (0..100).map(|n| format!("PUT /drop/input/any/10.5.0.{n}")).collect();
        assert_eq!(batch(lab, &rfw, "PUT /drop/input/any/1.1.1.1", &puts), ["200 inserted"; 100]);
        assert_eq!(ask("PUT /accept/input/any/10.5.0.0/24").status, 200);
        assert_eq!(batch(lab, &rfw, "PUT /drop/input/any/1.1.1.2", &puts), ["200 refreshed"; 100]);
        let rules = lab.rules();
        assert_eq!(rules.len(), 103);
        let last: Vec<_> =
            rules[100..].iter().map(|rule| rule.split(' ').nth(2).unwrap()).collect();
        assert_eq!(last, ["1.1.1.2/32", "10.5.0.0/24", "1.1.1.1/32"]);
    });
}

#[test]
fn an_order_that_others_have_changed_is_repaired() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/any/7.7.7.7");
        ask("PUT /accept/input/any/7.7.7.0/24");
        let right = lab.rules();
        lab.iptables("-D INPUT -s 7.7.7.7 -m comment --comment rfw -j DROP");
        lab.iptables("-I INPUT -s 7.7.7.7 -m comment --comment rfw -j DROP");
        await_repair("the accept is first again", 3 + SLACK, || lab.rules() == right);
    });
}

/// rfw must be able to delete every rule that it takes for its own: these it could not.
#[test]
fn rules_that_look_like_its_own_do_no_harm() {
    both(|lab| {
        let guard = "-m comment --comment rfw:guard -m tcp --dport 99 -j ACCEPT";
        lab.iptables(&format!("-A INPUT -p tcp {guard}"));
        lab.iptables("-A INPUT -s 1.1.1.1 -i any -m comment --comment rfw -j DROP");
        lab.iptables("-A INPUT -s 1.1.1.1 -i lo -m comment --comment rfw -j DROP");
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/any/2.2.2.2");
        lab.iptables("-D INPUT 1");
        let back = "-A INPUT -s 2.2.2.2/32 -m comment --comment rfw -j DROP";
        await_repair("it comes back", 3 + SLACK, || lab.iptables("-S").contains(back));
        assert_eq!(lab.iptables("-S INPUT").lines().count(), 5);
    });
}
