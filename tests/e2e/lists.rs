//! Whole lists in one request: every kind of line, all or nothing, with a rule for each address and
//! with sets (`modes`).

use crate::crash::Random;
use crate::lab::*;
use crate::tls;
use std::io::Write;
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

/// Each kind of line, and what it adds to the kernel.
const LINES: [(&str, &str); 20] = [
    ("# a feed", ""),
    ("; a comment of the other kind", ""),
    ("//and of the third", ""),
    ("9.0.0.9/32//a slash", "9.0.0.9"),
    ("", ""),
    (" \t ", ""),
    ("1.2.3.4", "1.2.3.4"),
    ("1.2.3.4", ""),
    ("1.2.3.4/32 # a double", ""),
    ("\t5.6.7.77/24;a block", "5.6.7.0/24"),
    ("5.6.7.8", "5.6.7.8"),
    ("11.128.0.0/9", "11.128.0.0/9"),
    ("10.0.0.0-10.0.0.2#a range", "10.0.0.0/31 10.0.0.2"),
    ("10.0.1.7-10.0.1.7", "10.0.1.7"),
    ("2001:db8::1", "2001:db8::1"),
    ("2001:DB8:0::1 ", ""),
    ("2001:db8:1::5/48", "2001:db8:1::/48"),
    ("2001:db8:2::-2001:db8:2::1", "2001:db8:2::/127"),
    ("2001:8000::/17", "2001:8000::/17"),
    ("::ffff:7.7.7.7", "7.7.7.7"),
];

/// Path; the rule for an address IP; the set for addresses of family N.
const PLACES: [(&str, &str, &str); 4] = [
    ("/drop/input/eth0", "INPUT -s IP -i eth0 -j DROP [rfw]", "rfwN:drop:in:eth0"),
    ("/Reject/Output/any/", "OUTPUT -d IP -j REJECT [rfw]", "rfwN:reject:out:any"),
    (
        "/accept/forward/ppp",
        "FORWARD -s IP -i ppp+ -j ACCEPT [rfw]",
        "rfwN:accept:fwd:ppp+:any:src",
    ),
    ("/drop/input/any", "INPUT -s IP -j DROP [rfw]", "rfwN:drop:in:any"),
];

#[test]
fn every_kind_of_line() {
    both(|lab| {
        modes(lab, "", |_, sets| {
            lab.iptables("-A INPUT -s 9.9.9.9 -j DROP");
            let others = lab.others();
            let whole: String = LINES.iter().map(|(line, _)| format!("{line}\n")).collect();
            let nets: Vec<_> = LINES.iter().flat_map(|(_, nets)| nets.split(' ')).collect();
            let nets: Vec<_> = nets.into_iter().filter(|net| !net.is_empty()).collect();
            let requests = [
                ("PUT", whole.clone(), "inserted 13"),
                ("PUT", whole.replace('\n', "\r\n"), "exists 13"),
                ("PUT", whole.replace('\n', "\r"), "exists 13"),
                ("PUT", format!("\u{feff}{whole}"), "exists 13"),
                ("PUT", format!("\u{feff}{}", nets.join("\r\n")), "exists 13"),
                ("PUT", whole.trim_end().into(), "exists 13"),
                ("DELETE", whole.clone(), "deleted 13"),
                ("DELETE", whole, "absent 13"),
                ("PUT", nets.join("\n"), "inserted 13"),
                ("DELETE", nets.join("\r\n"), "deleted 13"),
            ];
            for (place, rule, set) in PLACES {
                for (method, body, sums) in &requests {
                    let request = format!("{method} {place}");
                    assert_eq!(list(&request, body).sums(), *sums, "{request}");
                    let there = if *method == "PUT" { &nets[..] } else { &[] };
                    let want = if sets { in_set(there, set) } else { in_rules(there, rule) };
                    assert_eq!(kernel(lab), want, "{request}");
                    assert_eq!(ask("GET /list").body.matches("source").count(), want.len());
                }
            }
            assert_eq!(lab.others(), others);
        });
    });
}

fn in_rules(nets: &[&str], rule: &str) -> Vec<String> {
    let whole = |net: &str| match (net.contains('/'), net.contains(':')) {
        (true, _) => net.to_string(),
        (false, false) => format!("{net}/32"),
        (false, true) => format!("{net}/128"),
    };
    sorted(nets.iter().map(|net| rule.replace("IP", &whole(net))).collect())
}

fn in_set(nets: &[&str], set: &str) -> Vec<String> {
    let family = |net: &str| if net.contains(':') { "6" } else { "4" };
    sorted(nets.iter().map(|net| format!("{} {net}", set.replace('N', family(net)))).collect())
}

/// The rules for addresses, and the entries of the sets.
fn kernel(lab: &Lab) -> Vec<String> {
    let rules = lab.rules().into_iter().filter(|rule| !rule.contains("--match-set"));
    sorted(rules.chain(lab.entries().into_iter().map(|(entry, _)| entry)).collect())
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

/// Texts, separated by |, that are not an address, block or range that may be blocked.
const WRONG: &str = "0.0.0.0|::|0.0.0.0/0|0.0.0.0/32|::/0|1.2.3.4/8|1.2.3.4/0|1.2.3.4/33|1.2.3.4/024|\
    1.2.3.4/+24|1.2.3.4/|/24|1.2.3.4/24/24|1.2.3.4/255.255.255.0|2001:db8::/16|2001:db8::/129|\
    1.2.3|1.2.3.256|1.2.3.04|1.2.3.4.5|16909060|0x1020304|1.2.3.\u{664}|2001:db8::12345|\
    fe80::1%eth0|[2001:db8::1]|1.2.3.4:80|example.com|localhost|any|1.2.3.4 5.6.7.8|\
    1.2.3.4,5.6.7.8|1.2.3.4-|-1.2.3.4|1.2.3.4-1.2.3.3|1.2.3.4-9|1.2.3.4-1.2.3.8-1.2.3.9|\
    1.2.3.0/24-1.2.4.0/24|1.2.3.4-2001:db8::1|12.0.0.0-13.255.255.255|0.0.0.0-255.255.255.255|\
    2001::-2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff|drop 1.2.3.4|1.2.3.4 -j ACCEPT|COMMIT|\
    add rfw4:drop:in:any 1.2.3.4|1.2.3.4\0|\u{a0}1.2.3.4|1.2.3.4\u{b}";

/// Positions of an invalid line, and its number.
const FRAMES: [(&str, &str); 6] = [
    ("WRONG\n1.2.3.4\n5.6.7.8\n", "400 bad_list 1"),
    ("1.2.3.4\nWRONG # why\n2001:db8::1\n", "400 bad_list 2"),
    ("1.2.3.4\r\n\r\n# two\r\nWRONG;\r\n5.6.7.8", "400 bad_list 4"),
    ("1.2.3.4\n5.6.7.8\nWRONG\n", "400 bad_list 3"),
    ("1.2.3.4\n2001:db8::1\nWRONG", "400 bad_list 3"),
    ("WRONG", "400 bad_list 1"),
];

#[test]
fn an_invalid_line_anywhere() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        assert_eq!(list("PUT /drop/input/any", "9.9.9.9").sums(), "inserted 1");
        let before = lab.rules();
        for wrong in WRONG.split('|') {
            for (frame, want) in FRAMES {
                let answer = list("PUT /drop/input/any?expire=1h", frame.replace("WRONG", wrong));
                assert_eq!(answer.sums(), want, "{wrong:?} in {frame:?}");
            }
        }
        let delete = list("DELETE /drop/input/any", "9.9.9.9\n1.2.3.4\nx\n");
        assert_eq!(delete.sums(), "400 bad_list 3");
        assert_eq!(list("PUT /drop/input/any", b"1.2.3.4\n\xff\n").sums(), "400 bad_list 2");
        assert_eq!(lab.rules(), before);
    });
}

#[test]
fn the_first_twenty_invalid_lines_are_reported() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let answer = list("PUT /drop/input/any", "1.2.3.4\nexample.com\n");
        let start =
            "{\"error\":\"bad_list\",\"message\":\"1 of 2 lines are invalid. Line 2: 'example.com'";
        assert!(answer.body.starts_with(start), "{answer:?}");
        assert!(answer.body.contains(",\"lines\":[{\"line\":2,\"message\":\""), "{answer:?}");
        assert!(answer.body.ends_with(".\"}]}\n"), "{answer:?}");
        assert!(answer.body.contains("example.com"), "{answer:?}");

        let all = "1.2.3.4\nx\n".repeat(30);
        let numbers: String = (1..=20).map(|n| format!(" {}", 2 * n)).collect();
        assert_eq!(list("PUT /drop/input/any", all).sums(), format!("400 bad_list{numbers}"));
    });
}

/// Request; body; response. None of them changes the kernel.
const REFUSED: [(&str, &str, &str); 20] = [
    ("PUT /drop/input/any", "", "400 empty_list"),
    ("DELETE /drop/input/any", "", "400 empty_list"),
    ("PUT /drop/input/any?expire=10w", "1.2.3.4", "400 bad_expire"),
    ("PUT /drop/input/any?other=1", "1.2.3.4", "400 bad_query"),
    ("PUT /drop/input/any?expire=1&expire=1", "1.2.3.4", "400 bad_query"),
    ("DELETE /drop/input/any?expire=1h", "1.2.3.4", "400 bad_query"),
    ("PUT /drop/input/-x", "1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input", "1.2.3.4", "400 bad_path"),
    ("PUT /drop", "1.2.3.4", "400 bad_path"),
    ("PUT /block/input/any", "1.2.3.4", "404 not_found"),
    ("PUT /drop/prerouting/any", "1.2.3.4", "404 not_found"),
    ("PUT /list/input/any", "1.2.3.4", "404 not_found"),
    ("POST /drop/input/any", "1.2.3.4", "405 method_not_allowed"),
    ("GET /drop/input/any", "1.2.3.4", "405 method_not_allowed"),
    ("PUT /list", "1.2.3.4", "405 method_not_allowed"),
    ("GET /list", "1.2.3.4", "413 content_too_large"),
    ("PUT /drop/input/any/1.2.3.4", "1.2.3.4", "413 content_too_large"),
    ("DELETE /drop/input/any/1.2.3.4/24", "1.2.3.4", "413 content_too_large"),
    ("PUT /drop/forward/any/1.2.3.4/eth1", "1.2.3.4", "413 content_too_large"),
    ("PUT /drop/input/any", "# nothing\r\n \n; at all", "400 empty_list"),
];

#[test]
fn unexpected_and_missing_bodies() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        for (request, body, want) in REFUSED {
            assert_eq!(list(request, body).brief(), want, "{request} {body}");
        }
        assert_eq!(lab.rules(), [""; 0]);
    });
}

/// The white.list names 192.0.2.0/24 and 2001:db8:ff::/48; 198.18.7.7 is this host's own address.
#[test]
fn whitelisted_addresses_are_cut_out_of_a_list() {
    both(|lab| {
        lab.write("white.list", "192.0.2.0/24\n2001:db8:ff::/48\n");
        modes(lab, "", |_, _| {
            let lines = "192.0.2.77\n9.9.9.9\n192.0.2.77/25 # mine\n192.0.2.0/23\n\
                         192.0.1.250-192.0.2.1\n2001:DB8:FF::1\n127.0.0.1\n2001:db8::1\n";
            let left =
                ["192.0.1.250/31", "192.0.1.252/30", "192.0.3.0/24", "2001:db8::1", "9.9.9.9"];
            let report = "\"whitelisted_count\":6,\"whitelisted\":[\"192.0.2.77\",\"192.0.2.0/25\",\
                        \"192.0.2.0/23\",\"192.0.1.250-192.0.2.1\",\"2001:db8:ff::1\",\"127.0.0.1\"]";
            let put = format!("\"inserted\":5,\"refreshed\":0,\"exists\":0,\"deleted\":0,{report}");
            let delete = format!("\"deleted\":5,\"absent\":0,{report}");
            for (request, sums) in [("PUT", put), ("DELETE", delete)] {
                let answer = list(&format!("{request} /drop/output/any"), lines);
                assert_eq!(answer.body, format!("{{\"result\":\"applied\",{sums}}}\n"));
                assert_eq!(answer.header("Content-Type"), Some("application/json"));
                let there = left.iter().filter(|_| request == "PUT");
                assert!(lab.kept().keys().eq(there), "{request}: {:?}", lab.kept());
            }
            let own: String = (1..=25).map(|n| format!("192.0.2.{n}\n")).collect();
            let answer = list("PUT /drop/output/any", own);
            assert_eq!(answer.sums(), "whitelisted 25");
            assert_eq!(answer.body.matches("192.0.2.").count(), 20);
        });
    });
}

#[test]
fn a_block_around_one_address_of_this_host_becomes_sixteen() {
    both(|lab| {
        lab.write("white.list", "198.19.7.7\n");
        sh("ip addr add 198.18.7.7/32 dev lo");
        modes(lab, "", |_, _| {
            for net in ["198.18.0.0/16", "198.19.0.0/16"] {
                let rows = [
                    ("PUT /drop", "inserted 16 whitelisted 1"),
                    ("PUT /drop", "exists 16 whitelisted 1"),
                    ("DELETE /drop", "deleted 16 whitelisted 1"),
                ];
                table(&rows, |request| list(&format!("{request}/input/any"), net).sums());
                assert!(lab.kept().is_empty(), "{:?}", lab.kept());
            }
            // An ACCEPT blocks no packet.
            assert_eq!(list("PUT /accept/input/any", "198.18.0.0/16").sums(), "inserted 1");
        });
    });
}

/// What curl sends, and whether it names the file. None contains an address.
const EMPTY: [&str; 8] = [
    "-T lab/empty",
    "-T - < lab/empty",
    "-T lab/comments",
    "-X PUT --data-binary @lab/comments",
    "-X PUT -d @lab/feed",
    "-X DELETE -d @lab/feed",
    "-X PUT -H Content-Length:0",
    "-X PUT",
];

#[test]
fn a_body_without_an_address_changes_nothing() {
    once(|lab| {
        lab.write("empty", "");
        lab.write("comments", "\u{feff}# none\r\n\r\n ; 1.2.3.4\r// 5.6.7.8");
        lab.write("feed", "# curl -d strips the newlines\n1.2.3.4\n5.6.7.8\n");
        let _rfw = lab.start("local.server");
        for options in EMPTY {
            for query in ["", "?lenient=true"] {
                let url = format!("http://localhost:7390/drop/input/any{query}");
                let answer = sh(&format!("curl -sS -m 30 -w %{{http_code}} {options} '{url}'"));
                let (body, status) = answer.split_at(answer.len() - 3);
                let answer =
                    Answer { status: status.parse().unwrap(), head: "".into(), body: body.into() };
                assert_eq!(answer.brief(), "400 empty_list", "{options}");
                let message = answer.field("message");
                assert!(message.contains("-T") && message.contains("--data-binary"), "{answer:?}");
            }
        }
        // Without a comment, -d makes one invalid line of a list.
        lab.write("plain", "1.2.3.4\n5.6.7.8\n");
        let answer = sh("curl -sS -X PUT -d @lab/plain http://localhost:7390/drop/input/any");
        assert!(answer.contains("bad_list") && answer.contains("--data-binary"), "{answer}");
        assert_eq!(lab.rules(), [""; 0]);
        let answer = sh("curl -sS -T lab/feed http://localhost:7390/drop/input/any");
        assert!(answer.contains("\"inserted\":2"), "{answer}");
    });
}

#[test]
fn a_lenient_list_skips_invalid_lines() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let lines = "1.2.3.4\nexample.com\n# x\n5.6.7.8\n10.0.0.0/8 # wide\n192.0.2.1\n";
        let wrong = "\"wrong\":[{\"line\":2,\"message\":\"'example.com' is not an \
                     address; write an address like 192.0.2.1 or 2001:db8::1.\"},{\"line\":5,\
                     \"message\":\"10.0.0.0/8 is wider than /9, the widest block of IPv4; leave it \
                     out, or split it.\"}]}";
        for (request, counts) in [
            (
                "PUT /drop/input/any?lenient=true&expire=1h",
                "\"inserted\":2,\"refreshed\":0,\"exists\":0,\"deleted\":0",
            ),
            ("DELETE /drop/input/any?lenient=true", "\"deleted\":2,\"absent\":0"),
        ] {
            let answer = list(request, lines);
            let counts = format!("{counts},\"wrong_count\":2,\"whitelisted_count\":1");
            let want = format!(
                "{{\"result\":\"applied\",{counts},\"whitelisted\":[\"192.0.2.1\"],{wrong}\n"
            );
            assert_eq!(answer.body, want);
        }
        let rows = [
            ("1.2.3.4\n", "inserted 1"),
            ("1.2.3.4\nx\n", "exists 1"),
            ("1.2.3.4\nx\ny\n", "400 bad_list 2 3"),
            ("<html>\n<body>404\n1.2.3.4\n", "400 bad_list 1 2"),
            ("# x\n# y\n\nx\n", "400 bad_list 4"),
            ("", "400 empty_list"),
        ];
        table(&rows, |lines| list("PUT /drop/input/any?lenient=true", lines).sums());
        let clean = list("PUT /drop/input/any?lenient=true", "1.2.3.4");
        assert!(clean.body.contains("\"wrong_count\":0,"), "{clean:?}");
        assert!(clean.body.contains(",\"wrong\":[]}"), "{clean:?}");
        transcript(&[
            ("PUT /drop/input/any/1.2.3.4?lenient=true", "400 bad_query"),
            ("GET /list?lenient=true", "400 bad_query"),
        ]);
        assert_eq!(list("PUT /drop/input/any?lenient=yes", "1.2.3.4").brief(), "400 bad_query");
        assert_eq!(
            list("PUT /drop/input/any?lenient=true&lenient=true", "x").brief(),
            "400 bad_query"
        );
        let log = lab.log();
        assert!(log.contains(" 2 wrong, 1 whitelisted "), "{log}");
    });
}

/// An invalid line, and its message.
const HINTS: [(&str, &str); 9] = [
    ("1.0.0.0/8", "1.0.0.0/8 is wider than /9"),
    ("2000::/16", "2000::/16 is wider than /17"),
    ("12.0.0.0-13.255.255.255", "12.0.0.0/7 is wider than /9"),
    ("[2001:db8::1]", "write 2001:db8::1, without brackets"),
    ("1.2.3.4:80", "all ports, so write 1.2.3.4."),
    ("[2001:db8::1]:443", "all ports, so write 2001:db8::1."),
    ("1.2.3.0/255.255.255.0", "as a prefix length: 1.2.3.0/24"),
    ("1.2.3.0 255.255.255.0", "as a prefix length: 1.2.3.0/24"),
    ("\u{1b}]0;x\u{7}\"'\\", r#"'\\u{1b}]0' is not"#),
];

#[test]
fn an_invalid_line_is_explained() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        for (line, hint) in HINTS {
            let answer = list("PUT /drop/input/any", format!("1.1.1.1\r{line}"));
            assert_eq!(answer.sums(), "400 bad_list 2", "{answer:?}");
            assert_eq!(answer.body.matches(hint).count(), 2, "{hint}: {answer:?}");
            assert!(answer.body.contains("Line 2: "), "{answer:?}");
        }
        assert_eq!(lab.rules(), [""; 0]);
    });
}

#[test]
fn the_expiry_is_that_of_the_request() {
    both(|lab| {
        modes(lab, "default.expire = 3", |_, _| {
            let (from, mut due) = (now(), 0);
            for (query, lines, sums) in [
                ("?expire=0", "1.1.1.1\n2001:db8::1\n", "inserted 2"),
                ("?expire=0", "1.1.1.1\n2001:db8::1\n", "exists 2"),
                ("?expire=1h", "2.2.2.2\n2001:db8::2\n", "inserted 2"),
                ("?expire=2h", "2.2.2.2\n1.1.1.1\n", "refreshed 2"),
                ("?expire=0&wait=true", "1.1.1.1\n", "refreshed 1"),
                ("?expire=9d", "3.3.3.3\n", "inserted 1"),
                ("", "3.3.3.0/30\n3.3.3.3\n2001:db8::3\n", "inserted 2 refreshed 1"),
            ] {
                due = now() + 3;
                let answer = list(&format!("PUT /drop/input/any{query}"), lines);
                assert_eq!(answer.sums(), sums, "{query} {lines:?}");
            }
            await_true("three entries expire", 5 + SLACK, || {
                let count = lab.kept().len();
                assert!(count == 7 || now() >= due, "early");
                count == 4
            });
            let hours = |expires: u64| (expires + 60 - from) / 3600;
            let kept: Vec<_> = lab.kept().into_iter().map(|(a, at)| (a, at.map(hours))).collect();
            let kept: Vec<_> = kept.iter().map(|(address, at)| (&address[..], *at)).collect();
            let permanent = [("1.1.1.1", None), ("2.2.2.2", Some(2))];
            let six = [("2001:db8::1", None), ("2001:db8::2", Some(1))];
            assert_eq!(kept, [permanent, six].concat());
        });
    });
}

#[test]
fn a_newer_list_precedes_older_rules() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let both = "1.1.1.1\n2.2.2.2\n";
        for (request, lines, sums) in [
            ("PUT /drop", both, "inserted 2"),
            ("PUT /accept", "2.2.2.2", "inserted 1"),
            ("PUT /drop", both, "refreshed 1 exists 1"),
            ("PUT /drop", both, "exists 2"),
            ("PUT /accept", both, "inserted 1 refreshed 1"),
        ] {
            assert_eq!(list(&format!("{request}/input/any"), lines).sums(), sums, "{request}");
        }
        let rules = lab.rules();
        let targets: Vec<_> = rules.iter().map(|rule| rule.split(' ').nth(4).unwrap()).collect();
        assert_eq!(targets, ["ACCEPT", "ACCEPT", "DROP", "DROP"], "{rules:?}");
    });
}

/// This many addresses, one per line: 10.0.0.1, 10.0.0.2 and so on.
fn addresses(numbers: std::ops::Range<usize>) -> String {
    let line = |n| format!("10.{}.{}.{}\n", n / 62_500, n / 250 % 250, n % 250 + 1);
    numbers.map(line).collect()
}

/// The ways to send a file in curl's manual.
const WAYS: [&str; 3] = ["-T FEED", "-T - < FEED", "-X PUT --data-binary @FEED"];

#[test]
fn curl_sends_a_file_in_every_way() {
    both(|lab| {
        tls::keys(lab);
        let count = 1000;
        let asks_first = format!("# {}\n", "x".repeat(2 << 20)); // for a body of 1 MiB or more
        lab.write("small", "1.2.3.4 # one\r\n2001:db8::/64\r\n");
        lab.write("large", &(addresses(0..count) + &asks_first));
        modes(lab, tls::CONF, |_, _| {
            let tls = "--cacert lab/keys/client/ca.crt -u mu:s3cret:pass https://127.0.0.1:7393";
            let http = "http://localhost:7390";
            for (server, feed, many) in
                [(http, "small", 2), (http, "large", count), (tls, "large", count)]
            {
                for way in WAYS.map(|way| way.replace("FEED", &format!("lab/{feed}"))) {
                    for (method, done) in [("", "inserted"), ("-X DELETE", "deleted")] {
                        let path = format!("{server}/drop/input/any");
                        let body = sh(&format!("curl -sS -m 30 {way} {method} {path}"));
                        let answer = Answer { status: 200, head: String::new(), body };
                        assert_eq!(
                            answer.sums(),
                            format!("{done} {many}"),
                            "{way} {method} {server}"
                        );
                    }
                }
            }
        });
    });
}

const PUT: &str = "PUT /drop/input/any";
const HEAD: &str = "PUT /drop/input/any HTTP/1.1\r\nHost: localhost\r\n";

/// A chunked body (`|` is CRLF), and the relevant part of the response.
const CHUNKS: [(&str, &str); 38] = [
    ("7|1.2.3.4|0||", "inserted 1"),
    ("007|1.2.3.4|000||", "inserted 1"),
    ("A|1.2.3.4\n\n\n|0||", "inserted 1"),
    ("a|1.2.3.4\n\n\n|0||", "inserted 1"),
    ("3|1.2|1|.|3|3.4|0||", "inserted 1"),
    ("9|1.2.3.4\r\n|9|5.6.7.8\r\n|0||", "inserted 2"),
    ("8|1.2.3.4\r|1|\n|0||", "inserted 1"),
    ("2|# |7|1.2.3.4|0||", "400 empty_list"),
    ("0||", "400 empty_list"),
    ("7;a|1.2.3.4|0||", "inserted 1"),
    ("7;a=b;c=\"d;\\\"e\"|1.2.3.4|0;f||", "inserted 1"),
    ("7|1.2.3.4|0|X: y|Content-Length: 3||", "inserted 1"),
    ("3|1.2|4|.3.x|0||", "400 bad_list 1"),
    ("|", "400 bad_request closed"),
    ("7", "400 bad_request closed"),
    ("7|1.2.3.4", "400 bad_request closed"),
    ("7|1.2.3.4|", "400 bad_request closed"),
    ("7|1.2.3.4|0|", "400 bad_request closed"),
    ("7|1.2.3.4|0|X: y|", "400 bad_request closed"),
    (" 7|1.2.3.4|0||", "400 bad_request closed"),
    ("7 |1.2.3.4|0||", "400 bad_request closed"),
    ("+7|1.2.3.4|0||", "400 bad_request closed"),
    ("-7|1.2.3.4|0||", "400 bad_request closed"),
    ("0x7|1.2.3.4|0||", "400 bad_request closed"),
    ("g|1.2.3.4|0||", "400 bad_request closed"),
    (";a|1.2.3.4|0||", "400 bad_request closed"),
    ("7,7|1.2.3.4|0||", "400 bad_request closed"),
    ("7\n1.2.3.4|0||", "400 bad_request closed"),
    ("7;a\n1.2.3.4|0||", "400 bad_request closed"),
    ("7;a\r1.2.3.4|0||", "400 bad_request closed"),
    ("7|1.2.3.4\n0||", "400 bad_request closed"),
    ("7|1.2.3.40||", "400 bad_request closed"),
    ("6|1.2.3.4|0||", "400 bad_request closed"),
    ("8|1.2.3.4|0||", "400 bad_request closed"),
    ("7|1.2.3.4|0|X : y||", "400 bad_request closed"),
    ("7|1.2.3.4|0|X: y\n|", "400 bad_request closed"),
    ("10000000000000007|1.2.3.4|0||", "413 content_too_large closed"),
    ("FFFFFFFFFFFFFFFF|1.2.3.4|0||", "413 content_too_large closed"),
];

#[test]
fn chunked_bodies() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        table(&CHUNKS, |body| {
            let mut conn = Conn::open();
            conn.send(format!(
                "{HEAD}Transfer-Encoding: chunked\r\n\r\n{}",
                body.replace('|', "\r\n")
            ));
            if !body.ends_with("||") {
                conn.writer().shutdown(Shutdown::Write).unwrap();
            }
            let answer = conn.answer().unwrap().sums();
            let kept = lab.kept().len();
            let open = conn.try_list("DELETE /drop/input/any", "1.2.3.4\n5.6.7.8\n").is_ok();
            let inserted =
                answer.strip_prefix("inserted ").map_or(0, |count| count.parse().unwrap());
            assert_eq!(kept, inserted, "{body}");
            answer + if open { "" } else { " closed" }
        });
    });
}

/// Without sets, there is no room for either.
#[test]
fn a_refused_list_costs_no_memory() {
    once(|lab| {
        let hosts = (0..1_000_000).map(|n| format!("1.{}.{}.{}\n", n >> 16, n >> 8 & 255, n & 255));
        let ranges = (0..4_000)
            .map(|n| format!("2001:db8:{n:x}::1-2001:db8:{n:x}:ffff:ffff:ffff:ffff:fffe\n"));
        for body in [hosts.collect::<String>(), ranges.collect()] {
            let rfw = lab.start("local.server");
            let answer = list("PUT /drop/input/any", &body);
            assert_eq!(answer.brief(), "507 insufficient_storage", "{answer:?}");
            let (peak, now) = (rfw.memory("VmHWM"), rfw.memory("VmRSS"));
            assert!(peak < 64 << 20, "{peak} bytes at most");
            assert!(now < 16 << 20, "{now} bytes afterwards");
            assert_eq!(ask("GET /list").body, "[]\n");
        }
    });
}

/// With the environment of contrib/rfw.service. Without it, 16 peers could exceed its MemoryMax.
#[test]
fn simultaneous_lists_leave_no_memory_behind() {
    once(|lab| {
        lab.configure("local.server");
        let unit = include_str!("../../contrib/rfw.service");
        let variable = unit.lines().find_map(|line| line.strip_prefix("Environment=")).unwrap();
        let mut rfw = lab.launch(&["env", variable]);
        rfw.await_ready();
        let ranges = (0..4_000)
            .map(|n| format!("2001:db8:{n:x}::1-2001:db8:{n:x}:ffff:ffff:ffff:ffff:fffe\n"));
        let body: &str = &ranges.collect::<String>();
        for round in 0..3 {
            let send = || list("PUT /drop/input/any", body).brief();
            thread::scope(|scope| {
                let sent: Vec<_> = (0..16).map(|_| scope.spawn(send)).collect();
                for thread in sent {
                    assert_eq!(thread.join().unwrap(), "507 insufficient_storage");
                }
            });
            let now = rfw.memory("VmRSS");
            assert!(now < 32 << 20, "{now} bytes after round {round}");
        }
    });
}

#[test]
fn a_connection_is_kept_alive_after_a_list() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let list = format!("{HEAD}Content-Length: 8\r\n\r\n1.2.3.4\n");
        let chunks = format!(
            "{HEAD}Transfer-Encoding: chunked\r\n\r\n9\r\n2001:db8:\r\n2\r\n:1\r\n0\r\n\r\n"
        );
        let get = "GET /list HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let wire = [&list, get, &chunks, get, &list].concat();
        let five = |conn: &mut Conn| {
            let brief = |answer: Answer| match answer.body.matches("source").count() {
                0 => answer.sums(),
                rules => format!("{rules} listed"),
            };
            (0..5).map(|_| brief(conn.answer().unwrap())).collect::<Vec<_>>()
        };
        let mut conn = Conn::open();
        conn.send(&wire);
        let want = ["inserted 1", "1 listed", "inserted 1", "2 listed", "exists 1"];
        assert_eq!(five(&mut conn), want);
        wire.bytes().for_each(|byte| conn.send([byte]));
        let want = ["exists 1", "2 listed", "exists 1", "2 listed", "exists 1"];
        assert_eq!(five(&mut conn), want);
    });
}

/// Path and fields of a request with `Expect: 100-continue`, and all its responses.
const EXPECT: [(&str, &str); 9] = [
    ("/drop/input/any|Content-Length: 8", "100 200"),
    ("/drop/input/any|Transfer-Encoding: chunked", "100 200"),
    ("/drop/input/any?expire=1h|Content-Length: 8", "100 200"),
    ("/drop/input/any|Content-Length: 67108865", "413"),
    ("/drop/input/any?x=1|Content-Length: 8", "400"),
    ("/drop/input/any/1.2.3.4|Content-Length: 8", "413"),
    ("/drop/input/-x|Content-Length: 8", "400"),
    ("/nothing|Content-Length: 8", "404"),
    ("/list|Content-Length: 8", "405"),
];

#[test]
fn expect_100_continue() {
    once(|lab| {
        let ask = |row: &str, user: &str| {
            let (path, field) = row.split_once('|').unwrap();
            let mut conn = Conn::open();
            conn.send(format!("PUT {path} HTTP/1.1\r\nHost: localhost\r\n{field}\r\n{user}"));
            conn.send("Expect: 100-continue\r\n\r\n");
            let first = conn.answer().unwrap().status;
            if first != 100 {
                return first.to_string();
            }
            let chunked = field.contains("chunked");
            conn.send(if chunked { "8\r\n1.2.3.4\n\r\n0\r\n\r\n" } else { "1.2.3.4\n" });
            format!("{first} {}", conn.answer().unwrap().status)
        };
        let rfw = lab.start("local.server");
        table(&EXPECT, |row| ask(row, ""));
        let mut old = Conn::open(); // HTTP/1.0 has no 100
        let fields = "Host: localhost\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n";
        old.send(format!("PUT /drop/input/any HTTP/1.0\r\n{fields}1.2.3.4\n"));
        assert_eq!(old.answer().unwrap().status, 200);
        drop(rfw);

        let credentials = "auth.username = u\nauth.password = p";
        let _rfw = lab.start(&format!("local.server\nlocal.server.authentication\n{credentials}"));
        assert_eq!(ask(EXPECT[0].0, ""), "401");
        assert_eq!(ask(EXPECT[0].0, "Authorization: Basic dTpw\r\n"), "100 200");
    });
}

#[test]
fn limits() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        const MIB: usize = 1 << 20;
        let entries =
            |count| (0..count).map(|n| format!("10.{}.{}.{}\n", n >> 16, n >> 8 & 255, n & 255));
        let line = |length: usize| format!("{:>length$}\n", "1.2.3.4");
        let comment = |length: usize| format!("1.2.3.4 #{}\n", "x".repeat(length));
        // The limit; a list; the response; a part of its message.
        let rows = [
            ("a million entries", entries(1_000_000).collect::<String>(), "absent 1000000", ""),
            ("and one more", entries(1_000_001).collect(), "413 content_too_large", "1000000"),
            ("64 MiB", "#".repeat(64 * MIB), "400 empty_list", ""),
            ("and one more", "#".repeat(64 * MIB + 1), "413 content_too_large", "64 MiB"),
            ("a line of 1 KiB", line(1024), "absent 1", ""),
            ("and one more", line(1025), "400 bad_list 1", ""),
            ("one that does not end", "1".repeat(MIB), "400 bad_list 1", ""),
            ("a long comment", comment(MIB), "absent 1", ""),
        ];
        for (what, body, want, named) in &rows {
            let answer = list("DELETE /drop/input/any", body);
            assert_eq!(answer.sums(), *want, "{what}");
            assert!(answer.field("message").replace(',', "").contains(named), "{answer:?}");
        }
        let mut conn = Conn::open();
        conn.send(format!("{HEAD}Transfer-Encoding: chunked\r\n\r\n"));
        (0..65).for_each(|_| conn.send(format!("100000\r\n#{}\r\n", "x".repeat(MIB - 1))));
        assert_eq!(conn.answer().unwrap().sums(), "413 content_too_large");
        assert_eq!(lab.rules(), [""; 0]);
    });
}

#[test]
fn a_client_that_stops_halfway_changes_nothing() {
    both(|lab| {
        modes(lab, "", |rfw, _| {
            let rows = [
                "Content-Length: 17\r\n\r\n1.2.3.4\n5.6.7.8\n",
                "Content-Length: 17\r\n\r\n",
                "Expect: 100-continue\r\nContent-Length: 16\r\n\r\n",
                "Transfer-Encoding: chunked\r\n\r\n8\r\n1.2.3.4\n\r\n",
                "Transfer-Encoding: chunked\r\n\r\n8\r\n1.2.3.4\n\r\n0\r\n",
                "Transfer-Encoding: chunked\r\n\r\n80\r\n1.2.3.4\n",
            ];
            for sent in rows {
                let mut conn = Conn::open();
                conn.send(format!("{HEAD}{sent}"));
                Conn::open().send(format!("{HEAD}{sent}")); // another one leaves at once
                conn.writer().shutdown(Shutdown::Write).unwrap();
                let said = conn.rest().replace("HTTP/1.1 100 Continue\r\n\r\n", "");
                assert!(said.is_empty() || said.starts_with("HTTP/1.1 400 "), "{sent}: {said}");
            }
            rfw.await_idle();
            assert!(lab.kept().is_empty());
            assert_eq!(list("PUT /drop/input/any", "1.2.3.4\n5.6.7.8\n").sums(), "inserted 2");
        });
    });
}

#[test]
fn a_slow_body_is_refused_and_delays_no_one() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        // Bytes per quarter of a second; the response.
        let rows = [(0, 408), (200, 408), (300, 200)];
        let body = &format!("1.2.3.4 #{:>91}\n", "").repeat(380); // 38,000 bytes
        thread::scope(|scope| {
            for (rate, status) in rows {
                scope.spawn(move || {
                    let (from, mut conn) = (Instant::now(), Conn::open());
                    conn.send(format!("{HEAD}Content-Length: {}\r\n\r\n", body.len()));
                    let mut writer = conn.writer();
                    scope.spawn(move || {
                        let pieces = body.as_bytes().chunks(rate.max(1)).filter(|_| rate > 0);
                        for (piece, quarters) in pieces.zip(1..) {
                            if writer.write_all(piece).is_err() {
                                break;
                            }
                            // Delays do not add up: a slower client would be refused.
                            let due = quarters * Duration::from_millis(250);
                            thread::sleep(due.saturating_sub(from.elapsed()));
                        }
                    });
                    let answer = conn.answer().unwrap();
                    assert_eq!(answer.status, status, "{rate} {answer:?}");
                    let seconds = from.elapsed().as_secs();
                    assert!((29..=32 + SLACK).contains(&seconds), "{rate}: {seconds} s");
                });
            }
            assert_eq!(list("PUT /drop/input/any", "6.6.6.6\n").sums(), "inserted 1");
        });
    });
}

/// Request; what iptables does instead of a change; whether the first family is undone at once.
const FAULTS: [(&str, &str, bool); 7] = [
    ("PUT", "case $me in ip6*) echo 'ip6tables: Bad luck.' >&2; exit 1;; esac", true),
    ("DELETE", "case $me in ip6*) echo 'ip6tables: Bad luck.' >&2; exit 1;; esac", true),
    ("PUT", "case $me in ipt*) echo 'iptables: Bad luck.' >&2; exit 1;; esac", true),
    ("PUT", "case $me in ip6*) kill -9 $$;; esac", true),
    // The kernel itself rejects one line of many.
    ("PUT", "case $me in ip6*) /bin/sed /::3/s/DROP/NOCHAIN/ | $real \"$@\"; exit $?;; esac", true),
    // Everything fails after the first family, even the undo, which succeeds a second later.
    ("PUT", "[ -e $lab/once ] && exit 1; /bin/touch $lab/once", false),
    ("DELETE", "[ -e $lab/again ] && exit 1; /bin/touch $lab/again", false),
];

#[test]
fn if_the_second_family_fails_the_first_is_undone() {
    both(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        let before = "1.1.1.1\n1.1.1.2\n2001:db8::1\n2001:db8::2\n";
        let after = "1.1.1.2\n1.1.1.3\n2001:db8::2\n2001:db8::3\n";
        assert_eq!(list("PUT /drop/input/any", before).sums(), "inserted 4");
        let rules = lab.rules();
        for (method, fault, is_restored) in FAULTS {
            lab.stand_in_for_changes(fault);
            let expire = if method == "PUT" { "?expire=1h" } else { "" };
            let answer = list(&format!("{method} /drop/input/any{expire}"), after);
            assert!([500, 503].contains(&answer.status), "{fault} {answer:?}");
            let message = answer.field("message");
            assert!(message.contains("The list was not applied."), "{fault} {answer:?}");
            assert_eq!(!message.contains("as soon as"), is_restored, "{fault} {answer:?}");
            assert!(lab.rules() == rules || !is_restored, "{fault} {:?}", lab.rules());
            lab.stand_in("");
            await_repair("all is as before", 3 + SLACK, || lab.rules() == rules);
        }
        // What rfw itself had deleted
        let restored =
            "WARNING restored rules that another program or a failed change had removed: ";
        await_true("it is logged", SLACK, || lab.log().contains(restored));
        assert_eq!(list("PUT /drop/input/any", before).sums(), "exists 4");
        assert_eq!(list("DELETE /drop/input/any", after).sums(), "deleted 2 absent 2");
    });
}

/// The sum of one count in all these responses, none of which is an error.
fn total(answers: &[Answer], word: &str) -> usize {
    let count = |answer: &Answer| match (answer.status, answer.field("result")) {
        (200, "applied") => answer.field(word).parse().unwrap_or(0),
        (200, result) => usize::from(result == word),
        _ => panic!("{answer:?}"),
    };
    answers.iter().map(count).sum()
}

/// Sends these at the same time.
fn together(lists: [(&str, String); 2]) -> Vec<Answer> {
    thread::scope(|scope| {
        let threads = lists.map(|(request, lines)| scope.spawn(move || list(request, lines)));
        threads.map(|thread| thread.join().unwrap()).into()
    })
}

#[test]
fn concurrent_lists_are_applied_one_after_the_other() {
    both(|lab| {
        modes(lab, "", |_, _| {
            let third = 120;
            let [one, two] = [addresses(0..2 * third), addresses(third..3 * third)];
            for _ in 0..5 {
                let timed = ("PUT /drop/input/any?expire=1h", one.clone());
                let answers = together([timed, ("PUT /drop/input/any", two.clone())]);
                assert_eq!(total(&answers, "inserted"), 3 * third);
                assert_eq!(total(&answers, "refreshed"), third);
                let kept = lab.kept();
                let count = kept.values().filter(|expires| expires.is_some()).count();
                assert!(kept.len() == 3 * third && [third, 2 * third].contains(&count), "{count}");

                let all = one.clone() + &two;
                let delete = ("DELETE /drop/input/any", all.clone());
                let answers = together([delete, ("PUT /drop/input/any", all)]);
                let deleted = total(&answers, "deleted");
                let kept = lab.kept().len();
                let inserted = total(&answers, "inserted");
                assert_eq!(kept, 3 * third - deleted + inserted);
                assert!(kept == 0 || kept == 3 * third, "{kept}");
                list("DELETE /drop/input/any", one.clone() + &two);
            }
        });
    });
}

#[test]
fn a_list_against_single_puts_of_the_same_addresses() {
    both(|lab| {
        modes(lab, "", |_, _| {
            const COUNT: usize = 60;
            let all = addresses(0..COUNT);
            let single = |step: usize| {
                let mut conn = Conn::open();
                let numbers = (0..COUNT).map(|n| n * step % COUNT);
                let path = |n| format!("{PUT}/{}?expire=1h", addresses(n..n + 1).trim());
                let put = |n| conn.ask(&path(n));
                numbers.map(put).collect::<Vec<_>>()
            };
            let answers: Vec<_> = thread::scope(|scope| {
                let mut threads = vec![
                    scope.spawn(|| (0..10).map(|_| list("PUT /drop/input/any", &all)).collect()),
                ];
                threads.extend([1, 7, 59].map(|step| scope.spawn(move || single(step))));
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(total(&answers, "inserted"), COUNT);
            assert_eq!(lab.kept().len(), COUNT);
            let last = [list("PUT /drop/input/any", &all)];
            assert_eq!(total(&last, "refreshed") + total(&last, "exists"), COUNT);
            assert!(lab.kept().values().all(Option::is_none));
        });
    });
}

/// Kills in each mode, for each of the two variants.
const KILLS: usize = 12;

/// With a state file, all of it or nothing. Without one, entries that a set has by then remain, and in a
/// user namespace rules, too.
#[test]
fn kill_9_in_the_middle_of_a_list() {
    both(|lab| {
        for file in ["", "state.file = state"] {
            modes(lab, file, |rfw, sets| {
                let in_parts = sets || is_in_user_namespace();
                kill_in_the_middle(lab, rfw, in_parts && file.is_empty());
                sh("rm -f lab/state");
            });
        }
    });
}

fn kill_in_the_middle(lab: &Lab, rfw: &mut Rfw<'_>, may_be_partial: bool) {
    let count = 1000;
    let lines = addresses(0..count);
    let mut random = Random::new();
    let begun = Instant::now();
    assert_eq!(list("PUT /drop/input/any", &lines).status, 200);
    let whole = begun.elapsed().as_micros() as u64;
    for n in 0..KILLS {
        let request = ["PUT /drop/input/any?expire=1h", "DELETE /drop/input/any", PUT][n % 3];
        let answer = thread::scope(|scope| {
            let client = scope.spawn(|| Conn::to(LOCAL)?.try_list(request, &lines));
            let moment = random.below(whole * 5 / 4);
            thread::sleep(Duration::from_micros(moment));
            rfw.kill();
            client.join().unwrap()
        });
        rfw.restart();
        // How many exist, and how many of them have an expiry.
        let is = || {
            let kept = lab.kept();
            (kept.len(), kept.values().flatten().count())
        };
        let all = [(count, count), (0, 0), (count, 0)];
        assert!(may_be_partial || all.contains(&is()), "{:?} after kill {n} in {request}", is());
        if !answer.is_ok_and(|answer| answer.status == 200) {
            assert_eq!(list(request, &lines).status, 200, "sending it again completes it");
        }
        assert_eq!(is(), all[n % 3], "kill {n} after {request}");
    }
}
