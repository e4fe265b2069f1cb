//! Tags: many sources, one list. Each withdraws its own rules and no others.

use crate::lab::*;
use std::net::UdpSocket;

/// The addresses of `GET /list` with a query, each with its tag, in kernel order.
fn listed(query: &str) -> String {
    let answer = ask(&format!("GET /list{query}"));
    assert_eq!(answer.status, 200, "{query}: {answer:?}");
    let rows = answer.body.split("\"source\":\"").skip(1).map(|row| {
        let tag = row.split("\"tag\":").nth(1).unwrap().split('}').next().unwrap();
        format!("{}@{}", row.split('"').next().unwrap(), tag.trim_matches('"'))
    });
    rows.collect::<Vec<_>>().join(" ")
}

/// The same, sorted: the kernel decides the order inside a set.
fn all(query: &str) -> String {
    let text = listed(query);
    let mut rows: Vec<&str> = text.split_whitespace().collect();
    rows.sort_unstable();
    rows.join(" ")
}

#[test]
fn an_address_stays_blocked_until_its_last_source_withdraws_it() {
    both(|lab| {
        modes(lab, "", |_, _| {
            transcript(&[
                ("PUT /drop/input/any/1.1.1.1", "200 inserted"),
                ("PUT /drop/input/any/1.1.1.1?tag=sshd", "200 inserted"),
                ("PUT /drop/input/any/1.1.1.1?tag=feed&expire=1h", "200 inserted"),
                ("PUT /drop/input/any/1.1.1.1?tag=sshd", "200 exists"),
                ("DELETE /drop/input/any/1.1.1.1?tag=other", "200 absent"),
                ("DELETE /drop/input/any/1.1.1.1?tag=sshd", "200 deleted"),
                ("DELETE /drop/input/any/1.1.1.1?tag=sshd", "200 absent"),
            ]);
            assert_eq!(all(""), "1.1.1.1@feed 1.1.1.1@null");
            assert_eq!(ask("GET /list?tag=").field("expires"), "null", "feed's expiry is its own");
            assert_ne!(ask("GET /list?tag=feed").field("expires"), "null");
            assert_eq!(ask("DELETE /drop/input/any/1.1.1.1").brief(), "200 deleted");
            assert_eq!(all(""), "1.1.1.1@feed");
            let answer = ask("PUT /drop/input/any/1.1.1.1?tag=feed&expire=2");
            assert_eq!((answer.brief().as_str(), answer.field("tag")), ("200 refreshed", "feed"));
            ask("PUT /drop/input/any/1.1.1.1?tag=sshd");
            await_true("feed's expires", 4 + SLACK, || all("") == "1.1.1.1@sshd");
        });
    });
}

#[test]
fn unblock_whatever_the_tag() {
    both(|lab| {
        modes(lab, "", |_, _| {
            for tag in ["", "?tag=a", "?tag=b"] {
                let lines = "1.1.1.1\n2.2.2.2\n2001:db8::1\n";
                assert_eq!(list(&format!("PUT /drop/input/any{tag}"), lines).sums(), "inserted 3");
            }
            assert_eq!(ask("DELETE /drop/input/any/1.1.1.1?tag=*").brief(), "200 deleted");
            assert_eq!(ask("DELETE /drop/input/any/1.1.1.1?tag=*").brief(), "200 absent");
            let answer = list("DELETE /drop/input/any?tag=*", "1.1.1.1\n2.2.2.2\n");
            assert_eq!(answer.sums(), "deleted 3 absent 1");
            assert_eq!(all(""), "2001:db8::1@a 2001:db8::1@b 2001:db8::1@null");
        });
    });
}

#[test]
fn a_list_that_replaces_is_exactly_the_list() {
    both(|lab| {
        modes(lab, "", |_, _| {
            let lines = "1.1.1.1\n2.2.2.2\n2001:db8::1\n";
            assert_eq!(list("PUT /drop/input/any?tag=feed", lines).sums(), "inserted 3");
            list("PUT /drop/input/any", "1.1.1.1\n9.9.9.9\n");
            list("PUT /drop/input/any?tag=other", "1.1.1.1\n");
            ask("PUT /drop/output/any/1.1.1.1?tag=feed");
            let others = "1.1.1.1@null 1.1.1.1@other 9.9.9.9@null";
            let replace = "PUT /drop/input/any?tag=feed&replace=true";
            assert_eq!(list(replace, "2.2.2.2\n3.3.3.3\n").sums(), "inserted 1 exists 1 deleted 2");
            assert_eq!(all("/input"), ["2.2.2.2@feed 3.3.3.3@feed", others].join(" ").sorted());
            assert_eq!(list(replace, "2001:db8::2\n").sums(), "inserted 1 deleted 2");
            assert_eq!(all("/input"), ["2001:db8::2@feed", others].join(" ").sorted());
            let rows = [
                ("PUT /drop/input/any?replace=true", "400 bad_query"),
                ("DELETE /drop/input/any?tag=feed&replace=true", "400 bad_query"),
                ("PUT /drop/input/any?tag=Feed&replace=true", "400 bad_tag"),
                (replace, "400 bad_list"),
            ];
            table(&rows, |request| list(request, "nonsense\n").brief());
            // A failed download unblocks no address.
            for body in ["", "\n", "# nothing\n"] {
                assert_eq!(list(replace, body).brief(), "400 empty_list", "{body:?}");
            }
            // Nor does a list without any address that may be blocked.
            assert_eq!(list(replace, "127.0.0.1\n").brief(), "400 empty_list");
            let lenient = format!("{replace}&lenient=true");
            assert_eq!(list(&lenient, "127.0.0.1\n<html>\n").brief(), "400 bad_list");
            assert_eq!(all("/input"), ["2001:db8::2@feed", others].join(" ").sorted());
            assert_eq!(all("/output").matches("feed").count(), 1, "other chains stay");
        });
    });
}

trait Sorted {
    fn sorted(&self) -> String;
}

impl Sorted for String {
    fn sorted(&self) -> String {
        let mut words: Vec<&str> = self.split_whitespace().collect();
        words.sort_unstable();
        words.join(" ")
    }
}

#[test]
fn everything_from_a_bad_source_is_deleted() {
    both(|lab| {
        modes(lab, "", |_, _| {
            list("PUT /drop/input/any?tag=bad", "1.1.1.1\n2001:db8::1\n");
            transcript(&[
                ("PUT /accept/output/eth0/2.2.2.2?tag=bad", "200 inserted"),
                ("PUT /drop/forward/any/1.1.1.1/any/2.2.2.2?tag=bad", "200 inserted"),
                ("PUT /drop/input/any/3.3.3.3?tag=good", "200 inserted"),
                ("PUT /drop/input/any/3.3.3.3", "200 inserted"),
                ("DELETE /list", "400 bad_query"),
                ("DELETE /list?tag=", "400 bad_tag"),
            ]);
            let answer = ask("DELETE /list/output?tag=bad");
            assert_eq!(answer.sums(), "deleted 1");
            assert_eq!(ask("DELETE /list?tag=bad").sums(), "deleted 3");
            assert_eq!(ask("DELETE /list?tag=bad").sums(), "");
            assert_eq!(all(""), "3.3.3.3@good 3.3.3.3@null");
        });
    });
}

#[test]
fn tags_survive_kill_9_and_a_reboot() {
    both(|lab| {
        for state in ["", "state.file = state"] {
            modes(lab, state, |rfw, sets| {
                list("PUT /drop/input/any?tag=feed.1", "1.1.1.1\n2001:db8::1\n");
                list("PUT /drop/input/any?tag=a-tag-of_20.letters", "1.1.1.1\n");
                transcript(&[
                    ("PUT /drop/input/any/1.1.1.1?expire=1h", "200 inserted"),
                    ("PUT /drop/input/eth0/1.1.1.1?tag=sshd&expire=1h", "200 inserted"),
                    ("PUT /reject/forward/any/1.1.1.1/eth1?tag=sshd", "200 inserted"),
                    ("PUT /drop/forward/any/1.1.1.1/any/2.2.2.2?tag=sshd", "200 inserted"),
                    ("DELETE /drop/input/any/1.1.1.1?tag=sshd", "200 absent"),
                ]);
                let rows = || {
                    let text = ask("GET /list").body;
                    let mut rows: Vec<String> = text.lines().map(without_number).collect();
                    rows.sort_unstable();
                    rows
                };
                let before = rows();
                assert_eq!(before.len(), 7, "{before:?}");
                rfw.kill();
                rfw.restart();
                assert_eq!(rows(), before, "after kill -9, sets: {sets}");
                if !state.is_empty() {
                    rfw.kill();
                    lab.reboot();
                    rfw.restart();
                    assert_eq!(rows(), before, "after a reboot, sets: {sets}");
                }
                assert_eq!(ask("DELETE /list?tag=sshd").sums(), "deleted 3");
                std::fs::remove_file(lab.dir.join("state")).ok();
            });
        }
    });
}

/// An element of the listing without what a restart may change: its number and fractions of a second.
fn without_number(row: &str) -> String {
    let (chain, rest) = row.trim_matches(['[', ']', ',']).split_once("\"num\"").unwrap();
    let (rest, expires) =
        rest.split_once("\"pkts\"").unwrap().1.split_once("\"expires\":").unwrap();
    let (expires, tag) = expires.split_once(',').unwrap();
    format!("{chain}{rest}{} {tag}", expires != "null")
}

#[test]
fn each_tag_has_its_own_rules_and_sets_in_the_kernel() {
    both(|lab| {
        modes(lab, "", |_, sets| {
            ask("PUT /drop/input/any/1.1.1.1?tag=feed");
            ask("PUT /drop/input/abcdefghij01/1.1.1.1?tag=a-long-tag");
            let rules = lab.iptables("-S INPUT");
            let marks: &[&str] = match sets {
                false => &["\"rfw@feed\"", "\"rfw@a-long-tag\""],
                true => &["rfw4:drop:in:any@feed src", "rfw4:drop:in:~", "\"rfw@feed\""],
            };
            marks.iter().for_each(|mark| assert!(rules.contains(mark), "{mark}: {rules}"));
            // The newer rule wins, whatever its tag; with sets, accept wins, then reject.
            ask("PUT /accept/input/any/1.1.1.1?tag=z");
            assert_eq!(listed("?ip=1.1.1.1").split(' ').next(), Some("1.1.1.1@z"));
        });
    });
}

#[test]
fn at_most_64_tags() {
    both(|lab| {
        modes(lab, "", |_, _| {
            for n in 0..64 {
                let put = format!("PUT /drop/input/any/1.1.1.1?tag=t{n}");
                assert_eq!(ask(&put).brief(), "200 inserted", "{n}");
            }
            transcript(&[
                ("PUT /drop/input/any/1.1.1.1?tag=t64", "507 insufficient_storage"),
                ("PUT /drop/input/any/1.1.1.1", "200 inserted"),
                ("PUT /drop/input/any/1.1.1.1?tag=t63", "200 exists"),
            ]);
        });
    });
}

/// Is it blocked, by what, until when?
#[test]
fn rules_about_an_address() {
    both(|lab| {
        modes(lab, "", |_, sets| {
            list("PUT /drop/input/any?tag=feed", "1.1.1.0/24\n1.1.1.1\n2.2.2.2\n2001:db8::/64\n");
            ask("PUT /drop/input/any/1.1.1.1?expire=1h");
            ask("PUT /drop/forward/any/1.1.1.1/any/5.5.5.5");
            let rows = [
                ("?ip=1.1.1.1", "1.1.1.0/24@feed 1.1.1.1@feed 1.1.1.1@null 1.1.1.1@null"),
                ("/input?ip=1.1.1.1&tag=", "1.1.1.1@null"),
                ("?ip=1.1.1.7", "1.1.1.0/24@feed"),
                ("?ip=1.1.0.0/16&tag=feed", "1.1.1.0/24@feed 1.1.1.1@feed"),
                ("?ip=5.5.5.5", "1.1.1.1@null"),
                ("?ip=2001:db8::7", "2001:db8::/64@feed"),
                ("?ip=9.9.9.9", ""),
                ("?tag=none", ""),
                ("?tag=feed", "1.1.1.0/24@feed 1.1.1.1@feed 2.2.2.2@feed 2001:db8::/64@feed"),
            ];
            table(&rows, all);
            let answer = ask("GET /list/input?ip=1.1.1.1&tag=");
            assert!(answer.expires() > now() + 3500);
            assert_eq!(answer.field("pkts"), if sets { "" } else { "0" });
            let errors = [
                ("GET /list?ip=x", "400 bad_address"),
                ("GET /list?ip=1.1.1.1/33", "400 bad_address"),
                ("GET /list?ip=", "400 bad_address"),
                ("GET /list?tag=*", "400 bad_tag"),
                ("GET /list?ip=1.1.1.1&expire=1h", "400 bad_query"),
            ];
            transcript(&errors);
            let many: String = (1..=20).map(|n| format!("7.7.7.{n}\n")).collect();
            list("PUT /drop/input/any?tag=feed", many);
            assert_eq!(all("?ip=7.7.7.0/24").matches("@feed").count(), 20);
            // A rule that the kernel has lost is not shown, even before rfw restores it.
            let lose = || match sets {
                true => lab.ipset("del rfw4:drop:in:any@feed 7.7.7.7"),
                false => lab.iptables("-D INPUT -s 7.7.7.7 -m comment --comment rfw@feed -j DROP"),
            };
            let is_held = || match sets {
                true => lab.ipset("save").contains(" 7.7.7.7 "),
                false => lab.iptables("-S INPUT").contains(" 7.7.7.7/32 "),
            };
            // Unless rfw was faster.
            let shown = (0..9).find_map(|_| {
                await_repair("it is there", 3 + SLACK, is_held);
                lose();
                let shown = all("?ip=7.7.7.7");
                (!is_held()).then_some(shown)
            });
            assert_eq!(shown.as_deref(), Some(""));
        });
    });
}

#[test]
fn what_each_source_stops() {
    both(|lab| {
        modes(lab, "", |_, _| {
            sh("for n in 7 8 9; do ip addr replace 10.9.9.$n/32 dev lo; done");
            let sockets =
                ["10.9.9.9:0", "10.9.9.8:0", "10.9.9.7:0"].map(|at| UdpSocket::bind(at).unwrap());
            let send = |socket: &UdpSocket| {
                for _ in 0..3 {
                    socket.send_to(b"12345678", socket.local_addr().unwrap()).unwrap();
                }
            };
            ask("PUT /accept/input/any/10.9.9.9?tag=feed");
            ask("PUT /accept/input/any/10.9.9.8?tag=other");
            let shows = |name: &str, tag: &str, value: &str| {
                let labels = format!("{{chain=\"INPUT\",target=\"ACCEPT\",tag=\"{tag}\"}}");
                let line = format!("rfw_{name}{labels} {value}\n");
                let is_shown = || ask("GET /metrics").body.contains(&line);
                let is_held = || lab.iptables("-S INPUT").contains("feed");
                await_repair(&line, 3 + SLACK, || is_held() && is_shown());
            };
            send(&sockets[0]);
            shows("rules", "feed", "1");
            shows("packets_total", "feed", "3");
            shows("bytes_total", "feed", "108");
            // A refreshed rule starts at zero in the kernel; a metric never decreases.
            ask("PUT /accept/input/any/10.9.9.9?tag=feed&expire=1h");
            send(&sockets[1]);
            shows("packets_total", "other", "3"); // so rfw has read the zero, too
            send(&sockets[0]);
            shows("packets_total", "feed", "6");
            // The packets of a rule that is deleted were subtracted from those of another one.
            ask("PUT /accept/input/any/10.9.9.7?tag=feed");
            send(&sockets[2]);
            ask("DELETE /accept/input/any/10.9.9.9?tag=feed");
            shows("packets_total", "feed", "9");
        });
    });
}
