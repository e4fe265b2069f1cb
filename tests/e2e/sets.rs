//! Addresses in ipsets: a set and a rule for each target, chain, interfaces and family. Lists are
//! tested in `lists`, with rules and with sets.

use crate::lab::*;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A path; its entry, if it has one; its rule, with SET for `--match-set`.
const ROWS: [(&str, &str, &str); 13] = [
    ("/drop/input/eth0/1.2.3.4", "1.2.3.4", "INPUT -i eth0 SET rfw4:drop:in:eth0 src -j DROP"),
    (
        "/drop/input/eth0/1.2.3.4/24",
        "1.2.3.0/24",
        "INPUT -i eth0 SET rfw4:drop:in:eth0 src -j DROP",
    ),
    ("/Accept/Input/any/::ffff:1.1.1.1", "1.1.1.1", "INPUT SET rfw4:accept:in:any src -j ACCEPT"),
    (
        "/reject/input/ppp/11.128.0.0/9",
        "11.128.0.0/9",
        "INPUT -i ppp+ SET rfw4:reject:in:ppp+ src -j REJECT",
    ),
    ("/drop/input/any/2001:8000::/17", "2001:8000::/17", "INPUT SET rfw6:drop:in:any src -j DROP"),
    (
        "/accept/output/Lan_1.2.x-34567/2001:DB8:0::1",
        "2001:db8::1",
        "OUTPUT -o Lan_1.2.x-34567 SET rfw6:accept:out:Lan_1.2.x-34567 dst -j ACCEPT",
    ),
    ("/drop/output/any/5.6.7.8", "5.6.7.8", "OUTPUT SET rfw4:drop:out:any dst -j DROP"),
    ("/drop/forward/any/1.2.3.4", "1.2.3.4", "FORWARD SET rfw4:drop:fwd:any:any:src src -j DROP"),
    (
        "/drop/forward/eth/1.2.3.4/eth1/0.0.0.0",
        "1.2.3.4",
        "FORWARD -i eth+ -o eth1 SET rfw4:drop:fwd:eth+:eth1:src src -j DROP",
    ),
    (
        "/drop/forward/any/0.0.0.0/eth1/5.6.7.8",
        "5.6.7.8",
        "FORWARD -o eth1 SET rfw4:drop:fwd:any:eth1:dst dst -j DROP",
    ),
    (
        "/reject/forward/any/::/any/2001:db8::/64",
        "2001:db8::/64",
        "FORWARD SET rfw6:reject:fwd:any:any:dst dst -j REJECT",
    ),
    (
        "/drop/forward/eth0/1.2.3.4/eth1/5.6.7.8",
        "",
        "FORWARD -s 1.2.3.4/32 -d 5.6.7.8/32 -i eth0 -o eth1 -j DROP",
    ),
    (
        "/accept/forward/any/2001:db8::1/any/2001:db8:2::/48",
        "",
        "FORWARD -s 2001:db8::1/128 -d 2001:db8:2::/48 -j ACCEPT",
    ),
];

fn start(lab: &Lab) -> Rfw<'_> {
    lab.start(&format!("local.server\n{SETS}"))
}

fn names(lab: &Lab) -> Vec<String> {
    lab.ipset("list -n").lines().map(String::from).collect()
}

/// Sets of a list that is being transferred.
fn transient(lab: &Lab) -> Vec<String> {
    let names = names(lab).into_iter();
    names.filter(|name| name.get(..3) == Some("rfw") && name.get(4..5) != Some(":")).collect()
}

/// The entries without their timeouts.
fn entries(lab: &Lab) -> Vec<String> {
    lab.entries().into_iter().map(|(entry, _)| entry).collect()
}

/// An empty set and its rule may stay until a restart, which does not warn of them.
fn expect_empty(lab: &Lab, rfw: &mut Rfw<'_>) {
    assert_eq!(entries(lab), [""; 0]);
    lab.clear_log();
    rfw.restart();
    assert_eq!((lab.rules().len(), names(lab).len()), (0, 0));
    assert!(!lab.log().contains("current rules"), "{}", lab.log());
}

#[test]
fn rows() {
    both(|lab| {
        lab.ipset("create hers hash:net");
        lab.ipset("add hers 9.9.9.9");
        lab.iptables("-A INPUT -m set --match-set hers src -j DROP");
        let others = lab.others();
        let mut rfw = start(lab);
        let mut conn = Conn::open();
        let mut wanted = vec!["hers 9.9.9.9".to_string()];
        for (path, address, rule) in ROWS {
            for (method, answer) in [
                ("DELETE", "200 absent"),
                ("PUT", "200 inserted"),
                ("PUT", "200 exists"),
                ("DELETE", "200 deleted"),
                ("PUT", "200 inserted"),
            ] {
                assert_eq!(
                    conn.ask(&format!("{method} {path}")).brief(),
                    answer,
                    "{method} {path}"
                );
            }
            let set = rule.split(' ').skip_while(|word| *word != "SET").nth(1);
            wanted.extend(set.map(|set| format!("{set} {address}")));
            wanted.sort();
            assert_eq!(entries(lab), wanted, "{path}");
            let rule = format!("{} [rfw]", rule.replace("SET", "--match-set"));
            assert!(lab.rules().contains(&rule), "{path}: {:#?}", lab.rules());
        }
        let rules = lab.rules();
        rfw.restart();
        assert_eq!((lab.rules(), entries(lab)), (rules, wanted));
        let set = lab.ipset("list -t rfw4:drop:in:eth0");
        for word in ["Type: hash:net", "family inet ", "maxelem 1048576", "timeout 0", "counters"] {
            assert!(set.contains(word), "{word}: {set}");
        }
        for (path, ..) in ROWS {
            assert_eq!(ask(&format!("DELETE {path}")).brief(), "200 deleted", "{path}");
        }
        assert_eq!(entries(lab), ["hers 9.9.9.9"]);
        // An empty set and its rule may stay until a restart.
        rfw.restart();
        assert_eq!((lab.rules().len(), names(lab)), (0, vec!["hers".to_string()]));
        assert_eq!(lab.others(), others);
    });
}

#[test]
fn long_names_are_shortened_unique_and_stable() {
    both(|lab| {
        let mut rfw = start(lab);
        let paths = ["abcdefghijklmn8", "abcdefghijklmn9"]
            .map(|out| format!("/accept/forward/abcdefghijklmn7/1.2.3.4/{out}"));
        paths
            .iter()
            .for_each(|path| assert_eq!(ask(&format!("PUT {path}")).brief(), "200 inserted"));
        let names = names(lab);
        assert_eq!(names.len(), 2);
        for name in &names {
            assert!(name.starts_with("rfw4:accept:fwd:~") && name.len() <= 31, "{name}");
        }
        rfw.restart();
        assert_eq!(self::names(lab), names);
        let list = ask("GET /list/forward").body;
        assert!(list.contains("\"inp\":\"abcdefghijklmn7\",\"out\":\"abcdefghijklmn9\""), "{list}");
        paths
            .iter()
            .for_each(|path| assert_eq!(ask(&format!("DELETE {path}")).brief(), "200 deleted"));
        expect_empty(lab, &mut rfw);
    });
}

#[test]
fn accept_precedes_reject_precedes_drop_precedes_all_others() {
    both(|lab| {
        lab.iptables("-A FORWARD -s 9.9.9.9 -j DROP");
        let mut rfw = start(lab);
        let plain = "drop/forward/any/1.1.1.1/any/2.2.2.2";
        for path in [
            plain,
            "drop/forward/any/1.1.1.1",
            "accept/forward/eth0/3.1.1.1",
            "reject/forward/any/2.1.1.1",
            "drop/forward/eth0/1.1.1.1",
            "accept/forward/any/0.0.0.0/any/1.1.1.1",
            "accept/forward/any/1.1.1.1/any/3.3.3.3",
        ] {
            assert_eq!(ask(&format!("PUT /{path}")).brief(), "200 inserted", "{path}");
        }
        let targets = || {
            let lines = lab.iptables("-S FORWARD");
            let of_line = |line: &str| {
                let target = line.split_once(" -j ").unwrap().1.split(' ').next().unwrap();
                format!("{target}{}", if line.contains("--match-set") { " set" } else { "" })
            };
            lines.lines().skip(1).map(of_line).collect::<Vec<_>>()
        };
        let sets = ["ACCEPT set", "ACCEPT set", "REJECT set", "DROP set", "DROP set"];
        let want = [&sets[..], &["ACCEPT", "DROP", "DROP"]].concat();
        assert_eq!(targets(), want);
        ask(&format!("PUT /{plain}?expire=1h")); // it moves to the front of the plain ones
        let want = [&sets[..], &["DROP", "ACCEPT", "DROP"]].concat();
        assert_eq!(targets(), want);
        rfw.restart();
        assert_eq!(targets(), want);
        lab.iptables("-F FORWARD");
        let want = [&sets[..], &["DROP", "ACCEPT"]].concat();
        await_repair("they come back in order", 3 + SLACK, || targets() == want);
    });
}

#[test]
fn a_put_moves_an_address_out_of_the_other_targets_sets() {
    both(|lab| {
        let _rfw = start(lab);
        let two = "1.1.1.1\n2.2.2.2\n";
        for (request, lines, answer, entries_are) in [
            ("PUT /drop/input/any", two, "inserted 2", ["drop 1.1.1.1", "drop 2.2.2.2"]),
            ("PUT /accept/input/any", "1.1.1.1", "inserted 1", ["accept 1.1.1.1", "drop 2.2.2.2"]),
            ("PUT /reject/input/any", two, "inserted 2", ["reject 1.1.1.1", "reject 2.2.2.2"]),
            ("PUT /reject/input/any", two, "exists 2", ["reject 1.1.1.1", "reject 2.2.2.2"]),
            ("DELETE /drop/input/any", two, "absent 2", ["reject 1.1.1.1", "reject 2.2.2.2"]),
            ("PUT /drop/input/any/2.2.2.2", "", "200 inserted", ["drop 2.2.2.2", "reject 1.1.1.1"]),
            ("PUT /drop/input/any/1.1.1.1", "", "200 inserted", ["drop 1.1.1.1", "drop 2.2.2.2"]),
        ] {
            let got = if lines.is_empty() { ask(request) } else { list(request, lines) };
            assert_eq!(got.sums(), answer, "{request} {lines:?}");
            let short = |entry: String| entry.replace("rfw4:", "").replace(":in:any", "");
            let got: Vec<_> = entries(lab).into_iter().map(short).collect();
            assert_eq!(got, entries_are, "{request} {lines:?}");
        }
        // Another prefix, interface, chain or side is another set or entry.
        transcript(&[
            ("PUT /accept/input/any/1.1.1.0/24", "200 inserted"),
            ("PUT /accept/input/eth0/1.1.1.1", "200 inserted"),
            ("PUT /accept/output/any/1.1.1.1", "200 inserted"),
            ("PUT /accept/forward/any/1.1.1.1", "200 inserted"),
            ("PUT /drop/forward/any/0.0.0.0/any/1.1.1.1", "200 inserted"),
            ("DELETE /drop/input/any/1.1.1.1", "200 deleted"),
        ]);
        assert_eq!(entries(lab).len(), 6);
    });
}

#[test]
fn expiry() {
    both(|lab| {
        let mut rfw = lab.start(&format!("local.server\n{SETS}\ndefault.expire = 3"));
        let from = now();
        let timed = ask("PUT /drop/input/any/1.1.1.1");
        assert!((from + 3..=now() + 4).contains(&timed.expires()), "{timed:?}");
        assert_eq!(list("PUT /drop/output/any", "2.2.2.2\n2001:db8::2\n").sums(), "inserted 2");
        transcript(&[
            ("PUT /reject/input/any/3.3.3.3", "200 inserted"),
            ("PUT /reject/input/any/3.3.3.3?expire=0", "200 refreshed"),
            ("PUT /reject/input/any/4.4.4.4?expire=2147483", "200 inserted"),
            ("PUT /reject/input/any/5.5.5.5?expire=2147484", "400 bad_expire"),
            ("PUT /reject/input/any/5.5.5.5?expire=24d", "200 inserted"),
            ("PUT /drop/forward/any/6.6.6.6/any/7.7.7.7", "200 inserted"),
        ]);
        let answer = list("PUT /reject/input/any?expire=25d", "5.5.5.6\n");
        assert_eq!(answer.brief(), "400 bad_expire");
        assert!(answer.field("message").replace(',', "").contains("2147483"), "{answer:?}");
        rfw.kill(); // the kernel does it alone
        await_true("all that is timed expires", 4 + SLACK, || {
            let count = lab.entries().len();
            assert!(count == 6 || now() + 1 >= timed.expires(), "early");
            count == 3
        });
        assert_eq!((lab.rules().len(), names(lab).len()), (5, 4));
        rfw.restart();
        await_repair("rules and sets go too", 3 + SLACK, || {
            (lab.rules().len(), names(lab).len()) == (1, 1)
        });
        let rules = lab.rules();
        assert_eq!(rules, ["INPUT --match-set rfw4:reject:in:any src -j REJECT [rfw]"]);
        let left = |entry: (String, u64)| entry.1;
        let times: Vec<_> = lab.entries().into_iter().map(left).collect();
        assert!(times[0] == 0 && times[1] > 2_147_000 && times[2] > 24 * 86_000, "{times:?}");
        transcript(&[("DELETE /reject/input/any/3.3.3.3", "200 deleted")]);
        list("DELETE /reject/input/any", "4.4.4.4\n5.5.5.5\n");
        expect_empty(lab, &mut rfw);
    });
}

#[test]
fn get_list() {
    both(|lab| {
        sh("ip addr add 10.9.9.9/32 dev lo");
        lab.iptables("-A INPUT -s 9.9.9.9 -j DROP");
        let mut rfw = start(lab);
        assert_eq!(ask("GET /list").body, "[]\n");
        let expires = ask("PUT /drop/input/eth0/7.7.7.77/24?expire=1h").expires();
        ask("PUT /accept/input/any/10.9.9.9");
        ask("PUT /drop/forward/eth0/::/ppp/2001:db8::1");
        ask("PUT /reject/forward/eth0/1.1.1.1/eth1/2.2.2.2");
        let socket = UdpSocket::bind("10.9.9.9:0").unwrap();
        (0..3).for_each(|_| drop(socket.send_to(b"12345678", socket.local_addr().unwrap())));
        let want = format!(
            r#"[{{"chain":"INPUT","num":"1","pkts":"3","bytes":"108","target":"ACCEPT","prot":"all","opt":"--","inp":"*","out":"*","source":"10.9.9.9","destination":"0.0.0.0/0","extra":"","expires":null,"tag":null}},{{"chain":"INPUT","num":"2","pkts":"0","bytes":"0","target":"DROP","prot":"all","opt":"--","inp":"eth0","out":"*","source":"7.7.7.0/24","destination":"0.0.0.0/0","extra":"","expires":{expires},"tag":null}},{{"chain":"FORWARD","num":"1","pkts":"0","bytes":"0","target":"REJECT","prot":"all","opt":"--","inp":"eth0","out":"eth1","source":"1.1.1.1","destination":"2.2.2.2","extra":"","expires":null,"tag":null}},{{"chain":"FORWARD","num":"1","pkts":"0","bytes":"0","target":"DROP","prot":"all","opt":"--","inp":"eth0","out":"ppp+","source":"::/0","destination":"2001:db8::1","extra":"","expires":null,"tag":null}}]"#
        );
        for restarted in [false, true] {
            // The kernel stores the time left in whole seconds.
            let body = ask("GET /list").body.replace([' ', '\n'], "");
            let near = [expires - 1, expires, expires + 1].map(|time| time.to_string());
            let body =
                near.iter().fold(body, |body, time| body.replace(time, &expires.to_string()));
            assert_eq!(body, want, "restarted: {restarted}");
            assert_eq!(ask("GET /list/input").body.matches("source").count(), 2);
            assert_eq!(ask("GET /list/output").body, "[]\n");
            rfw.restart();
        }
        let many: String = (0..10_000).map(|n| format!("11.{}.{}.1\n", n >> 8, n & 255)).collect();
        assert_eq!(list("PUT /drop/output/any", many).sums(), "inserted 10000");
        let body = ask("GET /list/output").body;
        assert_eq!(body.matches("\"num\":\"1\"").count(), 10_000);
        assert!(body.contains("\"destination\":\"11.39.15.1\""));
    });
}

#[test]
fn a_full_set() {
    both(|lab| {
        let start = |most| lab.start(&format!("local.server\n{SETS}\nipset.maxelem = {most}"));
        let rfw = start(10);
        let four =
            |range: std::ops::Range<u32>| range.map(|n| format!("1.1.1.{n}\n")).collect::<String>();
        let six = |range: std::ops::Range<u32>| {
            range.map(|n| format!("2001:db8::{n}\n")).collect::<String>()
        };
        let full = "507 set_full";
        for (request, lines, answer, kept) in [
            ("PUT /drop/input/any", four(0..11), full, 0),
            ("PUT /drop/input/any", six(0..3) + &four(0..11), full, 0),
            ("PUT /drop/input/any", four(0..3) + &six(0..11), full, 0),
            ("PUT /drop/input/any", four(0..10), "inserted 10", 10),
            ("PUT /drop/input/any", four(0..10), "exists 10", 10),
            ("PUT /drop/input/any?expire=1h", four(5..11), full, 10),
            ("PUT /drop/input/any?expire=1h", six(0..3) + &four(9..11), full, 10),
            ("PUT /drop/input/any?expire=1h", four(5..6), "refreshed 1", 10),
            ("PUT /drop/input/any?expire=0", four(5..6), "refreshed 1", 10),
            ("PUT /drop/input/any/1.1.1.10", String::new(), full, 10),
            ("PUT /drop/input/any/1.1.1.9", String::new(), "200 exists", 10),
            ("PUT /drop/output/any", four(0..10), "inserted 10", 20),
            ("DELETE /drop/output/any", four(0..10), "deleted 10", 10),
            ("PUT /accept/input/any", four(0..11), full, 10),
            ("PUT /accept/input/any", four(0..10), "inserted 10", 10),
            ("DELETE /accept/input/any/1.1.1.0", String::new(), "200 deleted", 9),
            ("PUT /accept/input/any/1.1.1.10", String::new(), "200 inserted", 10),
            ("PUT /accept/input/any/1.1.1.11", String::new(), full, 10),
        ] {
            let got = if lines.is_empty() { ask(request) } else { list(request, &lines) };
            assert_eq!(got.sums(), answer, "{request} {lines:?} {got:?}");
            let entries = lab.entries();
            assert_eq!(entries.len(), kept, "{request} {lines:?} {entries:?}");
            assert!(entries.iter().all(|(_, left)| *left == 0) || answer == "refreshed 1");
        }
        assert!(ask("PUT /accept/input/any/1.1.1.11").field("message").contains("ipset.maxelem"));
        drop(rfw);
        for (most, first, second) in
            [(11, "200 inserted", full), (5, full, full), (13, "200 inserted", "200 inserted")]
        {
            let _rfw = start(most);
            for (n, want) in [(0, first), (1, second)] {
                let answer = ask(&format!("PUT /accept/input/any/2.2.{most}.{n}")).brief();
                assert_eq!(answer, want, "ipset.maxelem = {most}");
            }
        }
        assert_eq!(lab.entries().len(), 13);
    });
}

#[test]
fn a_flush_brings_back_a_rule_for_each_set() {
    both(|lab| {
        let mut rfw = start(lab);
        let lines = "1.1.1.1\n2.2.2.0/24\n2001:db8::1\n";
        ["drop/input/any", "accept/input/eth0", "reject/output/any", "drop/forward/any"]
            .iter()
            .for_each(|place| {
                assert_eq!(list(&format!("PUT /{place}"), lines).sums(), "inserted 3")
            });
        let (rules, entries) = (lab.rules(), lab.entries());
        assert_eq!((rules.len(), entries.len()), (8, 12));
        let flush = || {
            lab.iptables("-F");
            lab.ip6tables("-F");
        };
        flush();
        await_repair("eight rules come back", 3 + SLACK, || lab.rules() == rules);
        let warning = " WARNING restored rules ";
        await_true("a warning", SLACK, || lab.read("rfw.log").contains(warning));
        lab.iptables("-D INPUT 1");
        lab.ip6tables("-D FORWARD 1");
        await_repair("two rules come back in order", 3 + SLACK, || lab.rules() == rules);
        rfw.kill();
        flush();
        rfw.restart();
        // As with rules: what the kernel does not enforce when rfw starts does not count.
        assert_eq!((lab.rules().len(), lab.entries().len()), (0, 0));
    });
}

#[test]
fn sets_that_others_change_destroy_or_use() {
    both(|lab| {
        let mut rfw = start(lab);
        let rule = |set: &str| {
            format!("INPUT --match-set rfw4:{set}:in:any src -j {} [rfw]", set.to_uppercase())
        };
        transcript(&[
            ("PUT /drop/input/any/1.1.1.1", "200 inserted"),
            ("PUT /accept/input/any/2.2.2.2", "200 inserted"),
        ]);
        // Entries that others add are removed, entries that they remove are restored.
        lab.ipset("add rfw4:drop:in:any 3.3.3.3");
        let entries_are = ["rfw4:accept:in:any 2.2.2.2", "rfw4:drop:in:any 1.1.1.1"];
        let are_right = || entries(lab) == entries_are;
        await_repair("an address that no request has put is removed", 3 + SLACK, are_right);
        let removed = "WARNING removed addresses from sets that are not rfw's current rules: 1";
        await_true("the log says so", SLACK, || lab.log().contains(removed));
        assert!(!lab.log().contains("restored"), "{}", lab.log());
        lab.ipset("flush rfw4:drop:in:any");
        await_repair("a flushed set is filled", 3 + SLACK, are_right);
        await_true("the log says so", SLACK, || lab.log().contains("WARNING restored rules"));

        let destroy = "ipset destroy rfw4:accept:in:any";
        let iptables = lab.iptables_path(); // rfw may restore its rule before the set is gone
        sh(&format!("until {iptables} -w -F && {destroy}; do :; done"));
        let rules = [rule("accept"), rule("drop")];
        await_repair("set and rules are restored", 3 + SLACK, || {
            are_right() && lab.rules() == rules
        });

        // With its rule, it can be neither destroyed nor swapped.
        let create = "ipset create rfw4:drop:in:any hash:ip timeout 0 counters";
        let create = format!("{create} && ipset add rfw4:drop:in:any 1.1.1.1");
        let its_rule =
            "INPUT -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP";
        let create = format!("{create} && {iptables} -w -I {its_rule}");
        sh(&format!("until {iptables} -w -F && ipset destroy && {create}; do :; done"));
        await_repair("a set of another type is replaced", 3 + SLACK, || {
            let its_header = "Name: rfw4:drop:in:any\nType: hash:net\n";
            let has_type = lab.ipset("list -terse").contains(its_header);
            has_type && are_right() && lab.rules() == rules
        });

        // Someone else's rule uses the set.
        lab.iptables("-A OUTPUT -m set --match-set rfw4:drop:in:any dst -j DROP");
        let others = lab.others();
        transcript(&[("DELETE /drop/input/any/1.1.1.1", "200 deleted")]);
        rfw.restart();
        assert_eq!(lab.rules(), [rule("accept")]);
        transcript(&[("PUT /drop/input/any/1.1.1.1", "200 inserted")]);
        assert_eq!(lab.rules(), rules);
        assert!(are_right() && lab.others() == others);
    });
}

/// Programs start and end all the time here, which interrupts threads that wait for a client.
#[test]
fn the_last_entry_leaves_while_another_comes() {
    both(|lab| {
        let _rfw = start(lab);
        let rules = ["INPUT --match-set rfw4:drop:in:any src -j DROP [rfw]"];
        let until = Instant::now() + Duration::from_secs(4);
        thread::scope(|scope| {
            scope.spawn(|| {
                while Instant::now() < until {
                    let answer = ask("GET /list");
                    assert_eq!(answer.status, 200, "{answer:?}");
                }
            });
            let mut conn = Conn::open();
            for n in 0.. {
                assert_eq!(conn.ask("PUT /drop/input/any/1.1.1.1").brief(), "200 inserted");
                assert_eq!(entries(lab), ["rfw4:drop:in:any 1.1.1.1"], "{n}");
                assert_eq!(lab.rules(), rules, "{n}");
                if Instant::now() > until {
                    break;
                }
                assert_eq!(conn.ask("DELETE /drop/input/any/1.1.1.1").brief(), "200 deleted");
                thread::sleep(Duration::from_millis(n % 8 * 60)); // a different moment of rfw's second
            }
        });
    });
}

/// The elements of GET /list, without counters and positions, and their expiries.
fn listed() -> Vec<(String, Option<u64>)> {
    let body = ask("GET /list").body;
    let rows = body.split("\"chain\":").skip(1).map(|row| {
        let words = ["\"target\":", "\"inp\":", "\"extra\":"].map(|word| row.find(word).unwrap());
        let expires = row.split("\"expires\":").nth(1).unwrap().split(',').next().unwrap();
        let chain = row.split(',').next().unwrap();
        (
            format!("{chain} {} {}", &row[words[0]..words[0] + 14], &row[words[1]..words[2]]),
            expires.parse().ok(),
        )
    });
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    rows
}

#[test]
fn switching_moves_all_and_unblocks_nothing() {
    both(|lab| {
        sh(STRANGERS);
        let mut rfw = lab.start("local.server");
        transcript(&[
            ("PUT /drop/input/any/10.9.9.9?expire=1h", "200 inserted"),
            ("PUT /drop/input/any/fd09::/64", "200 inserted"),
            ("PUT /reject/output/eth0/1.1.1.0/24?expire=24d", "200 inserted"),
            ("PUT /accept/forward/any/2001:db8::1", "200 inserted"),
            ("PUT /drop/forward/ppp/0.0.0.0/any/1.1.1.1", "200 inserted"),
            ("PUT /drop/forward/any/1.1.1.1/any/2.2.2.2?expire=2h", "200 inserted"),
            ("PUT /drop/forward/eth0/3.3.3.3/any/4.4.4.4", "200 inserted"),
        ]);
        let mut rows = listed();
        let mut same = || {
            // A set accepts and shows whole seconds.
            let near = |a: Option<u64>, b: Option<u64>| match (a, b) {
                (Some(a), Some(b)) => a.abs_diff(b) <= 2,
                (a, b) => a == b,
            };
            let now = listed();
            let all = now.iter().zip(&rows).all(|(a, b)| a.0 == b.0 && near(a.1, b.1));
            assert!(all && now.len() == rows.len(), "{now:#?} {rows:#?}");
            rows = now;
        };
        never_unblocked(|| {
            for _ in 0..3 {
                rfw.kill();
                lab.configure(&format!("local.server\n{SETS}"));
                rfw.restart();
                same();
                assert_eq!((lab.entries().len(), lab.rules().len()), (5, 7));
                rfw.kill();
                lab.configure("local.server");
                rfw.restart();
                same();
                assert_eq!((lab.rules().len(), names(lab).len()), (7, 0));
            }
        });
        let log = lab.log();
        assert!(!log.contains("removed"), "none has left the list: {log}");
        assert_eq!(log.matches("INFO IPv4: 5 rules").count(), 6, "{log}");
    });
}

/// In one transaction of iptables-nft, 100,000 deletions occupied the kernel for minutes.
#[test]
fn a_switch_of_many_rules_is_divided() {
    both(|lab| {
        sh(STRANGERS);
        lab.stand_in(
            "case $me in iptables-restore)
                /bin/cat > $lab/in.$$
                /bin/grep -c '^-D' $lab/in.$$ >> $lab/deletions
                $real \"$@\" < $lab/in.$$
                exit $?
            esac",
        );
        let mut rfw = lab.start("local.server");
        let many: String = (0..6_000).map(|n| format!("5.5.{}.{}\n", n / 250, n % 250)).collect();
        assert_eq!(list("PUT /drop/input/any", &many).sums(), "inserted 6000");
        assert_eq!(ask("PUT /drop/input/any/10.9.9.9").brief(), "200 inserted");
        assert_eq!(ask("PUT /drop/input/any/fd09::/64").brief(), "200 inserted");
        never_unblocked(|| {
            rfw.kill();
            lab.write("deletions", "");
            lab.configure(&format!("local.server\n{SETS}"));
            rfw.restart();
        });
        assert_eq!((lab.entries().len(), lab.rules().len()), (6_002, 2));
        let deletions = lab.read("deletions");
        let deletions: Vec<usize> = deletions.lines().map(|count| count.parse().unwrap()).collect();
        assert!(deletions.iter().sum::<usize>() >= 6_001);
        let most = deletions.into_iter().max().unwrap();
        let is_nft = lab.real("iptables").contains("nft");
        assert!(if is_nft { most <= 5_000 } else { most == 6_001 }, "{most}");
    });
}

#[test]
fn a_change_unblocks_nothing_meanwhile() {
    both(|lab| {
        sh(STRANGERS);
        modes(lab, "", |_, _| {
            let many: String = (0..50).map(|n| format!("10.9.9.{n}\nfd09::{n}\n")).collect();
            list("PUT /drop/input/any", &many);
            never_unblocked(|| {
                for request in [
                    "PUT /drop/input/any?expire=1h",
                    "PUT /reject/input/any",
                    "PUT /drop/input/any?expire=0",
                    "PUT /drop/input/lo",
                    "DELETE /drop/input/any",
                    "PUT /reject/input/lo?expire=2d",
                ] {
                    assert_eq!(list(request, &many).status, 200, "{request}");
                }
                for path in ["reject/input/lo", "drop/input/lo", "drop/input/any"] {
                    for ip in ["10.9.9.9", "fd09::9"] {
                        assert_eq!(ask(&format!("PUT /{path}/{ip}?expire=3h")).status, 200);
                    }
                }
            });
        });
    });
}

/// Signals the end of a test's body, even if it fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Meanwhile, both addresses send packets to themselves, none of which may arrive.
pub fn never_unblocked(body: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let probe = scope.spawn(|| {
            let sockets = ["10.9.9.9:0", "[fd09::9]:0"].map(|at| UdpSocket::bind(at).unwrap());
            sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
            let mut sent = 0;
            while !done.load(Ordering::SeqCst) {
                for socket in &sockets {
                    drop(socket.send_to(b"?", socket.local_addr().unwrap()));
                    assert!(socket.recv(&mut [0]).is_err(), "a packet came through");
                }
                sent += 1;
                thread::sleep(Duration::from_micros(100));
            }
            sent
        });
        let end = Done(&done);
        body();
        drop(end);
        assert!(probe.join().unwrap() > 20, "too few packets to mean anything");
    });
}

#[test]
fn a_whitelist_that_has_grown() {
    both(|lab| {
        let mut rfw = start(lab);
        let lines = "1.1.1.1\n10.0.0.0/9\n10.5.0.0/16\n10.5.5.5\n2001:db8::/64\n2001:db8:1::1\n";
        assert_eq!(list("PUT /drop/input/any", lines).sums(), "inserted 6");
        assert_eq!(list("PUT /reject/input/any", "10.5.5.6\n").sums(), "inserted 1");
        lab.write("white.list", "10.5.0.0/16\n2001:db8::7\n");
        rfw.restart();
        assert_eq!(entries(lab), ["rfw4:drop:in:any 1.1.1.1", "rfw6:drop:in:any 2001:db8:1::1"]);
        let log = lab.log();
        assert!(
            log.lines().any(|line| line.contains(" WARNING ") && line.contains("10.5.5.5")),
            "{log}"
        );
        await_repair("the empty set goes", 3 + SLACK, || {
            lab.rules().len() == 2 && names(lab).len() == 2
        });
    });
}

#[test]
fn a_rule_that_lives_longer_than_sets_keep_is_renewed() {
    once(|lab| {
        let mut rfw = lab.start("local.server\nstate.file = state");
        let expires = ask("PUT /drop/output/any/3.3.3.3?expire=30d").expires();
        rfw.kill();
        lab.configure(&format!("local.server\nstate.file = state\n{SETS}"));
        rfw.restart();
        let entries = lab.entries();
        assert!(entries.len() == 1 && entries[0].1 > 2_147_000, "{entries:?}");
        // As if two weeks had passed.
        lab.ipset("-exist add rfw4:drop:out:any 3.3.3.3 timeout 9999");
        rfw.restart();
        assert!(lab.entries()[0].1 > 2_147_000);
        assert!(lab.read("state").contains(&format!("+ {expires} /drop/output/any/3.3.3.3\n")));
    });
}

/// The staging sets of version 0.3, and sets without a rule.
#[test]
fn leftover_sets_are_destroyed_at_start() {
    once(|lab| {
        for set in ["rfw4?drop:in:any", "rfw4+drop:in:any", "rfw6-drop:in:any", "rfw4:drop:in:eth1"]
        {
            let family = if set.starts_with("rfw6") { "inet6" } else { "inet" };
            lab.ipset(&format!("create '{set}' hash:net family {family} timeout 0 counters"));
        }
        for create in ["hash:net maxelem 9 timeout 0 counters", "hash:net"] {
            lab.ipset(&format!("create rfw4:drop:in:any {create}"));
            lab.ipset("add rfw4:drop:in:any 1.1.1.1");
            let tail = "src -m comment --comment rfw -j DROP";
            lab.iptables(&format!("-A INPUT -m set --match-set rfw4:drop:in:any {tail}"));
            let rfw = start(lab);
            assert_eq!(entries(lab), ["rfw4:drop:in:any 1.1.1.1"], "{create}");
            assert_eq!((lab.rules().len(), names(lab).len()), (1, 1), "{create}");
            let set = lab.ipset("list -t rfw4:drop:in:any");
            assert!(set.contains("maxelem 1048576 timeout 0 counters"), "{set}");
            drop(rfw);
            lab.reboot();
        }
    });
}

/// Runs `fault` instead of a program's changes; calls that only read run the real program.
pub fn spoil(lab: &Lab, program: &str, fault: &str) {
    let changes = format!("*\" -S\"*|*save*|*list*) ;; *) case $me in {program}) {fault};; esac");
    lab.stand_in(&format!("case \"$me $*\" in {changes};; esac"));
}

fn start_with_stand_ins(lab: &Lab) -> Rfw<'_> {
    lab.stand_in("");
    lab.start(&format!("local.server\n{}", SETS.replace("/usr/sbin", "/run/lab/bin")))
}

/// What happens to a program's changes; the status of the response.
const FAULTS: [(&str, &str, u16); 6] = [
    ("ipset", "echo 'ipset: Bad luck.' >&2; exit 1", 500),
    ("ipset", "kill -9 $$", 503),
    ("ipset", "/usr/bin/head -n 30 | $real \"$@\"; kill -9 $$", 503),
    ("iptables*", "echo 'iptables: Bad luck.' >&2; exit 1", 500),
    ("ip6tables*", "echo 'ip6tables: Bad luck.' >&2; exit 1", 500),
    ("ip6tables*", "kill -9 $$", 503),
];

#[test]
fn a_list_that_fails_changes_nothing() {
    both(|lab| {
        let _rfw = start_with_stand_ins(lab);
        let four: String = (0..400).map(|n| format!("1.1.{}.{}\n", n / 200, n % 200)).collect();
        let all = four + "2001:db8::1\n2001:db8::2\n";
        assert_eq!(list("PUT /accept/input/any", "1.1.0.1\n1.1.1.1\n").sums(), "inserted 2");
        let before = (lab.rules(), entries(lab));
        for (program, fault, status) in FAULTS {
            spoil(lab, program, fault);
            let answer = list("PUT /drop/input/any?expire=1h", &all);
            assert_eq!(answer.status, status, "{program} {fault} {answer:?}");
            lab.stand_in("");
            let same = || (lab.rules(), entries(lab)) == before && transient(lab).is_empty();
            await_repair(&format!("all is as before: {program} {fault}"), 3 + SLACK, same);
        }
        assert_eq!(list("PUT /drop/input/any", "2.2.2.2\n").sums(), "inserted 1");
        assert_eq!(entries(lab).len(), 3);
    });
}

/// Accepts a batch of more than `$lab/lines` lines, and is killed when it has read that many.
const KILLED: &str = r#"case "$*" in *restore*)
    /bin/cat > $lab/input
    n=$(/bin/cat $lab/lines || echo 99)
    [ $(/usr/bin/wc -l < $lab/input) -gt $n ] || exec $real "$@" < $lab/input
    /bin/rm $lab/lines
    /usr/bin/head -n $n $lab/input | $real "$@"
    kill -9 $$;;
esac 2>/dev/null"#;

#[test]
fn an_ipset_that_is_killed_after_any_line() {
    once(|lab| {
        let _rfw = start_with_stand_ins(lab);
        spoil(lab, "ipset", KILLED);
        let lines = "1.1.1.1\n1.1.1.2\n2001:db8::1\n";
        // The entries of the sets afterwards, and whether they expire.
        let all = |target, timed| {
            let entry = |ip: &str| {
                (format!("rfw{}:{target}:in:any {ip}", if ip.contains(':') { 6 } else { 4 }), timed)
            };
            lines.lines().map(entry).collect::<Vec<_>>()
        };
        let requests = [
            ("PUT /drop/input/any", all("drop", false)),
            ("PUT /drop/input/any?expire=1h", all("drop", true)),
            ("PUT /accept/input/any", all("accept", false)),
            ("DELETE /accept/input/any", vec![]),
        ];
        let (mut before, mut kills) = (vec![], 0);
        for n in 0..18 {
            for (request, after) in &requests {
                lab.write_data("lines", &n.to_string());
                let answer = list(request, lines);
                kills += usize::from(!lab.dir.join("lines").exists());
                let entries = lab.entries().into_iter();
                let is: Vec<_> = entries.map(|(entry, left)| (entry, left > 0)).collect();
                let want = if answer.status == 200 { after } else { &before };
                assert_eq!(is, *want, "{request}, killed after {n} lines: {answer:?}");
                let _ = std::fs::remove_file(lab.dir.join("lines"));
                assert_eq!(list(request, lines).status, 200);
                before.clone_from(after);
            }
        }
        assert!(kills > 9, "{kills} kills");
        assert_eq!(transient(lab), [""; 0]);
    });
}

#[test]
fn an_invalid_configuration() {
    once(|lab| {
        let rows = [
            ("ipset.path = /nowhere/ipset", "1 rfw.conf:5"),
            ("ipset.path = bin/ipset", "1 rfw.conf:5"),
            ("ipset.path = ipset", "0"),
            ("ipset.path", "1 rfw.conf:5"),
            ("ipset.maxelem = 0", "1 rfw.conf:5"),
            ("ipset.maxelem = many", "1 rfw.conf:5"),
            ("ipset.maxelem = 4294967296", "1 rfw.conf:5"),
            (SETS, "0"),
        ];
        table(&rows, |line| {
            lab.configure(&format!("local.server\n{line}"));
            let (status, said) = lab.rfw("-f rfw.conf -t");
            let place = if said.contains("rfw.conf:5") { " rfw.conf:5" } else { "" };
            format!("{status}{place}")
        });
    });
}
