//! Every row of the API, as tables of requests, responses and kernel rules.

use crate::lab::{list as send, *};
use std::time::{Duration, Instant};

/// Path of the rule; the rule in the kernel.
const ROWS: [(&str, &str); 24] = [
    ("/drop/input/eth0/11.22.33.44", "INPUT -s 11.22.33.44/32 -i eth0 -j DROP"),
    ("/drop/input/any/11.22.33.44", "INPUT -s 11.22.33.44/32 -j DROP"),
    ("/accept/input/any/11.22.33.44", "INPUT -s 11.22.33.44/32 -j ACCEPT"),
    ("/reject/input/any/11.22.33.44", "INPUT -s 11.22.33.44/32 -j REJECT"),
    ("/DROP/Input/any/11.22.33.44/", "INPUT -s 11.22.33.44/32 -j DROP"),
    ("/%64rop/input/any/11%2E22.33.44", "INPUT -s 11.22.33.44/32 -j DROP"),
    ("/drop/input/any/11.22.33.44/32", "INPUT -s 11.22.33.44/32 -j DROP"),
    ("/drop/input/any/11.22.33.44/24", "INPUT -s 11.22.33.0/24 -j DROP"),
    ("/drop/input/any/11.128.0.0/9", "INPUT -s 11.128.0.0/9 -j DROP"),
    ("/drop/input/ppp/11.22.33.44", "INPUT -s 11.22.33.44/32 -i ppp+ -j DROP"),
    ("/drop/input/ppp+/11.22.33.44", "INPUT -s 11.22.33.44/32 -i ppp+ -j DROP"),
    ("/drop/input/eth0+/11.22.33.44", "INPUT -s 11.22.33.44/32 -i eth0+ -j DROP"),
    ("/drop/input/Lan_1.2@x-3/11.22.33.44", "INPUT -s 11.22.33.44/32 -i Lan_1.2@x-3 -j DROP"),
    (
        "/drop/input/abcdefghijklmn9/11.22.33.44",
        "INPUT -s 11.22.33.44/32 -i abcdefghijklmn9 -j DROP",
    ),
    ("/drop/input/any/::ffff:11.22.33.44", "INPUT -s 11.22.33.44/32 -j DROP"),
    ("/drop/input/eth0/2001:DB8:0::1", "INPUT -s 2001:db8::1/128 -i eth0 -j DROP"),
    ("/reject/input/any/2001:db8::1/64", "INPUT -s 2001:db8::/64 -j REJECT"),
    ("/drop/input/any/2001:8000::/17", "INPUT -s 2001:8000::/17 -j DROP"),
    ("/drop/output/eth0/11.22.33.44", "OUTPUT -d 11.22.33.44/32 -o eth0 -j DROP"),
    ("/accept/output/any/2001:db8::1", "OUTPUT -d 2001:db8::1/128 -j ACCEPT"),
    ("/drop/forward/eth0/11.22.33.44", "FORWARD -s 11.22.33.44/32 -i eth0 -j DROP"),
    ("/drop/forward/any/11.22.33.44/24/eth1", "FORWARD -s 11.22.33.0/24 -o eth1 -j DROP"),
    (
        "/drop/forward/eth0/11.22.33.44/eth/5.6.7.8/24",
        "FORWARD -s 11.22.33.44/32 -d 5.6.7.0/24 -i eth0 -o eth+ -j DROP",
    ),
    (
        "/accept/forward/any/2001:db8::1/any/2001:db8:2::/48",
        "FORWARD -s 2001:db8::1/128 -d 2001:db8:2::/48 -j ACCEPT",
    ),
];

#[test]
fn rows() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let mut conn = Conn::open();
        table(&ROWS, |path| {
            let mut ask = |method: &str| conn.ask(&format!("{method} {path}")).brief();
            assert_eq!(ask("PUT"), "200 inserted", "{path}");
            let rules = lab.rules();
            assert_eq!(ask("PUT"), "200 exists", "{path}");
            assert_eq!(lab.rules(), rules, "{path}");
            assert_eq!(ask("DELETE"), "200 deleted", "{path}");
            assert_eq!(lab.rules(), [""; 0], "{path}");
            assert_eq!(ask("DELETE"), "200 absent", "{path}");
            rules.join(" | ").replace(" [rfw]", "")
        });
    });
}

#[test]
fn any_address_in_forward() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        transcript(&[
            ("PUT /drop/forward/any/0.0.0.0/eth1/5.6.7.8", "200 inserted"),
            ("PUT /drop/forward/any/::/any/2001:db8::1", "200 inserted"),
            ("PUT /drop/forward/any/1.2.3.4/eth1/0.0.0.0", "200 inserted"),
        ]);
        let rules = [
            "FORWARD -s 1.2.3.4/32 -o eth1 -j DROP [rfw]",
            "FORWARD -d 5.6.7.8/32 -o eth1 -j DROP [rfw]",
            "FORWARD -d 2001:db8::1/128 -j DROP [rfw]",
        ];
        assert_eq!(lab.rules(), rules);
    });
}

/// Otherwise it would stop all routing. A rule that an older version accepted can be deleted.
#[test]
fn a_forward_rule_names_an_address() {
    both(|lab| {
        lab.iptables("-I FORWARD -i eth0 -m comment --comment rfw -j DROP");
        let _rfw = lab.start("local.server");
        transcript(&[
            ("PUT /drop/forward/any/0.0.0.0", "400 bad_path"),
            ("PUT /drop/forward/eth0/0.0.0.0", "400 bad_path"),
            ("PUT /accept/forward/any/::/eth1", "400 bad_path"),
            ("PUT /drop/forward/any/::/any/::", "400 bad_path"),
            ("DELETE /drop/forward/eth0/0.0.0.0", "200 deleted"),
            ("DELETE /drop/forward/eth0/0.0.0.0", "200 absent"),
        ]);
        assert_eq!(lab.rules(), [""; 0]);
    });
}

/// Interface, and whether the response and the log note that it does not exist.
const NOTED: [(&str, bool); 8] = [
    ("any", false),
    ("lo0", true),
    ("lo", false),
    ("l", false),
    ("eht0", true),
    ("eht", true),
    ("v0", false),
    ("v0.5", true),
];

#[test]
fn an_interface_that_does_not_exist_is_noted() {
    once(|lab| {
        sh("ip link add v0 type veth peer v1");
        let _rfw = lab.start("local.server");
        for (iface, is_noted) in NOTED {
            for request in ["PUT", "DELETE"] {
                let chain = if is_noted { "input" } else { "output" };
                let path = format!("{request} /drop/{chain}/{iface}");
                lab.clear_log();
                for answer in [ask(&format!("{path}/1.2.3.4")), send(&path, "5.6.7.8")] {
                    assert_eq!((answer.status, answer.field("error")), (200, ""), "{answer:?}");
                    let note = answer.field("note");
                    assert_eq!(note.contains(&format!("'{iface}'")), is_noted, "{answer:?}");
                    assert_eq!(note.is_empty(), !is_noted, "{answer:?}");
                    assert!(answer.body.ends_with("}\n"), "{answer:?}");
                }
                let log = lab.log();
                let warnings = log.lines().filter(|line| line.contains(" WARNING "));
                assert!(warnings.count() == if is_noted { 2 } else { 0 }, "{log}");
            }
        }
        let answer = ask("PUT /drop/forward/lo/1.2.3.4/eht0");
        assert!(answer.field("note").contains("'eht0'"), "{answer:?}");
    });
}

#[test]
fn a_typo_in_a_path_is_refused_with_the_right_path() {
    once(|lab| {
        lab.write("feed.txt", "1.2.3.4\n");
        let _rfw = lab.start("local.server");
        // curl appends the file's name where the URL ends in /.
        let rows = [
            ("-T lab/feed.txt", "/drop/input/", "400 bad_interface", "/drop/input/any,"),
            ("-T lab/feed.txt -X DELETE", "/drop/input/", "400 bad_interface", "/drop/input/any,"),
            ("-T lab/feed.txt", "/drop/output/eth0/", "400 bad_interface", "/drop/output/eth0,"),
            ("-T lab/feed.txt", "/drop/input/all", "400 bad_interface", "/drop/input/any."),
            ("-X PUT", "/drop/input/all/1.2.3.4", "400 bad_interface", "/drop/input/any."),
            ("-X PUT", "/Drop/FORWARD/ALL/1.2.3.4", "400 bad_interface", "/drop/forward/any."),
            ("-X PUT", "/drop/forward/any/1.2.3.4/all", "400 bad_interface", "write any"),
        ];
        for (options, path, brief, right) in rows {
            let body = sh(&format!("curl -sS -m 30 {options} http://localhost:7390{path}"));
            let answer = Answer { status: 400, head: String::new(), body };
            assert_eq!(answer.brief(), brief, "{options} {path}");
            assert!(answer.field("message").contains(right), "{answer:?}");
        }
        assert_eq!(lab.rules(), [""; 0]);
    });
}

/// Request and response. 198.18.0.1 and fd18::1 are this host's own addresses.
const OWN: [(&str, &str); 15] = [
    ("PUT /drop/input/any/198.18.0.1", "409 whitelisted"),
    ("PUT /reject/output/eth0/198.18.0.1", "409 whitelisted"),
    ("PUT /drop/input/any/198.18.0.0/16", "409 whitelisted"),
    ("PUT /drop/forward/any/1.2.3.4/any/198.18.0.1", "409 whitelisted"),
    ("PUT /drop/input/any/fd18::1", "409 whitelisted"),
    ("PUT /drop/input/any/fd18::/64", "409 whitelisted"),
    ("PUT /drop/input/any/::ffff:198.18.0.1", "409 whitelisted"),
    ("PUT /drop/input/any/198.18.0.2", "200 inserted"),
    ("PUT /drop/input/any/198.19.0.0/16", "200 inserted"),
    ("PUT /drop/input/any/fd18::2", "200 inserted"),
    ("PUT /drop/forward/any/0.0.0.0/any/1.2.3.4", "200 inserted"),
    ("PUT /accept/input/any/198.18.0.1", "200 inserted"),
    ("PUT /accept/input/any/fd18::/64", "200 inserted"),
    ("DELETE /drop/input/any/198.18.0.1", "200 absent"),
    ("DELETE /drop/input/any/fd18::/64", "200 absent"),
];

#[test]
fn this_hosts_own_addresses_are_never_blocked() {
    both(|lab| {
        modes(lab, "", |_, _| {
            // An address that was blocked before this host got it can be unblocked.
            transcript(&[("PUT /drop/input/any/198.18.0.1", "200 inserted")]);
            sh("ip addr add 198.18.0.1/32 dev lo; ip addr add fd18::1/128 dev lo nodad");
            transcript(&[
                ("PUT /drop/input/any/198.18.0.1", "409 whitelisted"),
                ("DELETE /drop/input/any/198.18.0.1", "200 deleted"),
            ]);
            transcript(&OWN);
            let answer = ask("PUT /drop/input/any/198.18.0.0/16");
            let message = answer.field("message");
            assert!(message.contains("198.18.0.1, this host's own address"), "{answer:?}");
            // Also if a socket can be bound to any address, and if there are thousands of routes.
            sh("echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind");
            transcript(&[
                ("PUT /drop/input/any/198.18.0.1", "409 whitelisted"),
                ("PUT /drop/input/any/198.18.0.3", "200 inserted"),
            ]);
            sh("echo 0 > /proc/sys/net/ipv4/ip_nonlocal_bind
                ip addr del 198.18.0.1/32 dev lo; ip addr del fd18::1/128 dev lo");
            transcript(&[("PUT /drop/input/any/198.18.0.1", "200 inserted")]);
        });
    });
}

/// No socket can be bound to an address that is still being checked for duplicates.
#[test]
fn a_tentative_address_is_this_hosts_own() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        sh("ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
            echo 100 > /proc/sys/net/ipv6/conf/v0/dad_transmits; ip addr add fd18::5/64 dev v0");
        transcript(&[("PUT /drop/input/any/fd18::5", "409 whitelisted")]);
        assert!(sh("ip addr show dev v0 tentative").contains("fd18::5"), "not tested");
    });
}

/// contrib/rfw.service: ProcSubset=pid hides /proc/net, and ProtectProc=invisible other processes.
#[test]
fn own_addresses_and_interfaces_are_known_in_the_hardened_unit() {
    once(|lab| {
        sh("ip addr add 198.18.0.1/32 dev lo");
        lab.configure("local.server");
        let proc = "mount -t proc -o subset=pid,hidepid=invisible proc /proc
            test -e /proc/self/net && ! test -e /proc/net && exec \"$0\" \"$@\"";
        let mut rfw = lab.launch(&["unshare", "-mpf", "--kill-child", "/bin/sh", "-c", proc]);
        rfw.await_ready();
        transcript(&[
            ("PUT /drop/input/any/198.18.0.0/16", "409 whitelisted"),
            ("PUT /drop/input/any/198.18.0.1", "409 whitelisted"),
            ("PUT /drop/input/any/198.18.0.2", "200 inserted"),
        ]);
        assert!(!ask("PUT /drop/input/eht0/198.18.0.2").field("note").is_empty());
        let log = lab.log();
        assert!(!log.contains("cannot list all of this"), "{log}");
    });
}

const BAD: [(&str, &str); 86] = [
    ("PUT /drop", "400 bad_path"),
    ("PUT /drop/input", "400 bad_path"),
    ("PUT /drop/input/eth0", "400 empty_list"),
    ("PUT /drop/input/eth0/1.2.3.4/24/eth1", "400 bad_path"),
    ("PUT /drop/output/eth0/1.2.3.4/eth1", "400 bad_mask"),
    ("PUT /drop/forward/eth0/1.2.3.4/24/eth1/5.6.7.8/24/x", "400 bad_path"),
    ("PUT /drop/output/eth0/1.2.3.4/24/eth1", "400 bad_path"),
    ("PUT /drop/input/eth0/1.2.3.4//", "400 bad_mask"),
    ("PUT /drop/input/eth0/1.2.3.4%", "400 bad_request"),
    ("PUT /drop/input/eth0/1.2.3.4%2", "400 bad_request"),
    ("PUT /drop/input/eth0/1.2.3.4%zz", "400 bad_request"),
    ("PUT /drop/input/any/1.2.3.4%2F24", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.%2534", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.4%00", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.4%0a", "400 bad_address"),
    ("PUT /drop/input/any/%ff", "400 bad_path"),
    ("PUT /drop/input/any/1.2.3", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.4.5", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.256", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.04", "400 bad_address"),
    ("PUT /drop/input/any/1.2.3.-4", "400 bad_address"),
    ("PUT /drop/input/any/0x01.2.3.4", "400 bad_address"),
    ("PUT /drop/input/any/example.com", "400 bad_address"),
    ("PUT /drop/input/any/2001:db8:::1", "400 bad_address"),
    ("PUT /drop/input/any/2001:db8::1::", "400 bad_address"),
    ("PUT /drop/input/any/2001:db8::12345", "400 bad_address"),
    ("PUT /drop/input/any/fe80::1%25eth0", "400 bad_address"),
    ("PUT /drop/input/any/[2001:db8::1]", "400 bad_request"),
    ("PUT /drop/input/any/0.0.0.0", "400 bad_address"),
    ("PUT /drop/input/any/::", "400 bad_address"),
    ("PUT /drop/output/any/0.0.0.0", "400 bad_address"),
    ("PUT /drop/input/any/0.0.0.0/32", "400 bad_address"),
    ("PUT /drop/forward/any/0.0.0.0/32", "400 bad_address"),
    ("PUT /drop/forward/any/::/128", "400 bad_address"),
    ("PUT /drop/forward/any/1.2.3.4/any/2001:db8::1", "400 bad_address"),
    ("PUT /drop/input/any/11.22.33.44/8", "400 bad_mask"),
    ("PUT /drop/input/any/11.22.33.44/0", "400 bad_mask"),
    ("PUT /drop/input/any/11.22.33.44/33", "400 bad_mask"),
    ("PUT /drop/input/any/11.22.33.44/024", "400 bad_mask"),
    ("PUT /drop/input/any/11.22.33.44/+24", "400 bad_mask"),
    ("PUT /drop/input/any/11.22.33.44/255.255.255.0", "400 bad_mask"),
    ("PUT /drop/input/any/11.22.33.44/99999999999", "400 bad_mask"),
    ("PUT /drop/input/any/2001:db8::1/16", "400 bad_mask"),
    ("PUT /drop/input/any/2001:db8::1/129", "400 bad_mask"),
    ("PUT /drop/input/abcdefghijklmno9/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/forward/eth0/1.2.3.4/5.6.7.8", "400 bad_interface"),
    ("PUT /drop/forward/1.2.3.4/5.6.7.8", "400 bad_interface"),
    ("PUT /drop/forward/any/1.2.3.0/255.255.255.0", "400 bad_interface"),
    ("PUT /drop/input/abcdefghijklmno/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/+/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/pp+p/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/-eth0/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/.eth0/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/eth%200/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/eth0%0a-j/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/!eth0/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/eth%c3%a90/1.2.3.4", "400 bad_interface"),
    ("PUT /drop/input/any/1.2.3.4?expire=", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=-1", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=10w", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=1.5h", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=1h1", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=1234567890", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=3651d", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=315360001", "400 bad_expire"),
    ("PUT /drop/input/any/1.2.3.4?expire=10s&expire=10s", "400 bad_query"),
    ("PUT /drop/input/any/1.2.3.4?wait=true&wait=true", "400 bad_query"),
    ("PUT /drop/input/any/1.2.3.4?wait=yes", "400 bad_query"),
    ("PUT /drop/input/any/1.2.3.4?other=1", "400 bad_query"),
    ("PUT /drop/input/any/1.2.3.4?modify=insert", "400 bad_query"),
    ("DELETE /drop/input/any/1.2.3.4?expire=10s", "400 bad_query"),
    ("GET /list?x=1", "400 bad_query"),
    ("PUT /drop/input/any/192.0.2.1", "409 whitelisted"),
    ("DELETE /accept/input/any/192.0.2.0/24", "409 whitelisted"),
    ("PUT /drop/forward/any/5.6.7.8/any/192.0.2.1", "409 whitelisted"),
    ("PUT /drop/input/any/127.0.0.1", "409 whitelisted"),
    ("PUT /drop/output/any/::1", "409 whitelisted"),
    ("PUT /nothing", "404 not_found"),
    ("PUT /drop//eth0/1.2.3.4", "404 not_found"),
    ("PUT /drop/prerouting/any/1.2.3.4", "404 not_found"),
    ("GET /list/prerouting", "404 not_found"),
    ("POST /drop/input/any/1.2.3.4", "405 method_not_allowed"),
    ("GET /drop/input/any/1.2.3.4", "405 method_not_allowed"),
    ("DELETE /list", "400 bad_query"),
    ("PUT /list", "405 method_not_allowed"),
    ("PUT /", "405 method_not_allowed"),
];

#[test]
fn refusals() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let before = lab.others();
        transcript(&BAD);
        let answer = ask("PUT /drop/input/any/1.2.3.4/99");
        assert_eq!(answer.header("Content-Type"), Some("application/json"));
        assert!(answer.body.starts_with("{\"error\":\"bad_mask\",\"message\":\""), "{answer:?}");
        assert!(answer.body.ends_with(".\"}\n"), "{answer:?}");
        assert_eq!((lab.rules(), lab.others()), (vec![], before));
    });
}

#[test]
fn allow_names_the_methods() {
    once(|lab| {
        let rows = [
            ("POST /drop/input/any/1.2.3.4", "PUT, DELETE"),
            ("HEAD /list", "GET, DELETE"),
            ("FOO /", "GET"),
        ];
        let mut rfw = lab.start("local.server");
        let allow = |request: &str| {
            let mut conn = Conn::open();
            conn.send(format!(
                "{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            ));
            let whole = conn.rest();
            assert!(whole.starts_with("HTTP/1.1 405 "), "{whole}");
            assert_eq!(whole.ends_with("\r\n\r\n"), request.starts_with("HEAD"), "{whole}");
            whole.split("Allow: ").nth(1).unwrap().split("\r\n").next().unwrap().to_string()
        };
        table(&rows, allow);
        rfw.kill();
        let _rfw = lab.start("local.server\nnon.restful");
        table(&[("POST /drop/input/any/1.2.3.4", "GET, PUT, DELETE")], allow);
    });
}

#[test]
fn responses_are_one_line_of_json() {
    both(|lab| {
        sh("ip link add eth0 type veth peer eth1; ip link add ppp0 type veth peer ppp1");
        let _rfw = lab.start("local.server");
        let rule = r#""rule":{"chain":"INPUT","target":"DROP","inp":"eth0","out":"*","source":"11.22.33.44","destination":"0.0.0.0/0"}"#;
        let request = "/drop/input/eth0/11.22.33.44";
        let rows = ["inserted", "exists"].map(|word| {
            (
                format!("PUT {request}"),
                format!("{{\"result\":\"{word}\",{rule},\"expires\":null,\"tag\":null}}\n"),
            )
        });
        for (request, body) in rows {
            let answer = ask(&request);
            assert_eq!(answer.body, body);
            assert_eq!(answer.header("content-type"), Some("application/json"));
        }
        let timed = ask(&format!("PUT {request}?expire=10m"));
        let want = format!(
            "{{\"result\":\"refreshed\",{rule},\"expires\":{},\"tag\":null}}\n",
            timed.expires()
        );
        assert_eq!(timed.body, want);

        let forward = ask("PUT /accept/forward/ppp/2001:db8::1/64/eth1/::");
        let rule = r#""rule":{"chain":"FORWARD","target":"ACCEPT","inp":"ppp+","out":"eth1","source":"2001:db8::/64","destination":"::/0"}"#;
        assert_eq!(
            forward.body,
            format!("{{\"result\":\"inserted\",{rule},\"expires\":null,\"tag\":null}}\n")
        );
    });
}

#[test]
fn expire_is_an_interval_and_the_kernel_keeps_it() {
    both(|lab| {
        let _rfw = lab.start("local.server\ndefault.expire = 2h");
        let rows = [
            ("?expire=90", 90),
            ("?expire=90s", 90),
            ("?expire=10m&wait=true", 600),
            ("?wait=true&expire=1h", 3600),
            ("?expire=2d", 172_800),
            ("?expire=3650d", 315_360_000),
            ("", 7200),
        ];
        for (query, seconds) in rows {
            let from = now();
            let answer = ask(&format!("PUT /drop/input/any/1.2.3.4{query}"));
            assert!(
                (from..=now() + 1).contains(&(answer.expires() - seconds)),
                "{query} {answer:?}"
            );
            let rule = format!("INPUT -s 1.2.3.4/32 -j DROP [rfw:{}]", answer.expires());
            assert_eq!(lab.rules(), [rule], "{query}");
        }
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4?expire=0").field("expires"), "null");
        assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
    });
}

#[test]
fn list() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        assert_eq!(ask("GET /list").body.trim_end(), "[]");
        let expires =
            ask("PUT /drop/input/eth0/11.22.33.44?expire=1h").field("expires").to_string();
        ask("PUT /reject/input/ppp/7.7.7.77/24");
        ask("PUT /accept/output/any/5.6.7.8");
        ask("PUT /drop/forward/eth0/1.1.1.1/eth1/2.2.2.2");
        ask("PUT /drop/output/any/2001:db8::1");
        let row = |chain: &str, num, target: &str, ends: &str, expires: &str| {
            format!(
                r#"{{"chain":"{chain}","num":"{num}","pkts":"0","bytes":"0","target":"{target}","prot":"all","opt":"--",{ends},"extra":"","expires":{expires},"tag":null}}"#
            )
        };
        let any = r#""source":"0.0.0.0/0""#;
        let to_any = r#""destination":"0.0.0.0/0""#;
        let reject = format!(r#""inp":"ppp+","out":"*","source":"7.7.7.0/24",{to_any}"#);
        let drop = format!(r#""inp":"eth0","out":"*","source":"11.22.33.44",{to_any}"#);
        let forward = r#""inp":"eth0","out":"eth1","source":"1.1.1.1","destination":"2.2.2.2""#;
        let accept = format!(r#""inp":"*","out":"*",{any},"destination":"5.6.7.8""#);
        let six = r#""inp":"*","out":"*","source":"::/0","destination":"2001:db8::1""#;
        let input = |num| {
            [row("INPUT", 1, "REJECT", &reject, "null"), row("INPUT", num, "DROP", &drop, &expires)]
        };
        let forward = [row("FORWARD", 1, "DROP", forward, "null")];
        let output =
            [row("OUTPUT", 1, "ACCEPT", &accept, "null"), row("OUTPUT", 1, "DROP", six, "null")];
        let whole = [&input(2)[..], &forward, &output].concat();
        assert_eq!(rows_of(&ask("GET /list/Input")), input(2));
        assert_eq!(rows_of(&ask("GET /list/forward/")), forward);
        assert_eq!(rows_of(&ask("GET /list/output")), output);
        let [mut got, mut want] = [rows_of(&ask("GET /list")), whole];
        got.sort();
        want.sort();
        assert_eq!(got, want);
        // A foreign rule is counted, until a check moves rfw's rules in front of it.
        let is_counted = |_| {
            lab.iptables("-I INPUT 2 -s 3.3.3.3 -j DROP");
            rows_of(&ask("GET /list/input")) == input(3)
        };
        assert!((0..10).any(is_counted));
    });
}

/// The objects of a JSON array, each as its text.
fn rows_of(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    let inside = answer.body.trim_end().strip_prefix('[').unwrap().strip_suffix(']').unwrap();
    let rows = inside.split_inclusive('}');
    rows.map(|row| row.trim_start_matches(|c: char| c == ',' || c.is_whitespace()).into()).collect()
}

#[test]
fn list_counts_packets() {
    both(|lab| {
        sh("ip addr add 10.9.9.9/32 dev lo");
        let _rfw = lab.start("local.server");
        ask("PUT /accept/input/any/10.9.9.9");
        let socket = std::net::UdpSocket::bind("10.9.9.9:0").unwrap();
        for _ in 0..3 {
            socket.send_to(b"12345678", socket.local_addr().unwrap()).unwrap();
        }
        let answer = ask("GET /list");
        assert_eq!((answer.field("pkts"), answer.field("bytes")), ("3", "108"));
    });
}

#[test]
fn list_is_what_the_kernel_has() {
    both(|lab| {
        let count = lab.seed(3000, "rfw");
        let _rfw = lab.start("local.server");
        let answer = ask("GET /list");
        let sources: Vec<_> = answer.body.split("\"source\":\"").skip(1).collect();
        assert_eq!(sources.len(), count);
        for (n, source) in sources.iter().enumerate() {
            assert!(source.starts_with(&format!("10.{}.{}.1\"", n / 256, n % 256)), "{n} {source}");
        }
    });
}

#[test]
fn help() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let answer = ask("GET /");
        assert_eq!(answer.status, 200);
        assert!(answer.header("Content-Type").unwrap().starts_with("text/plain"), "{answer:?}");
        for word in [env!("CARGO_PKG_VERSION"), "7390", "curl", "/list", "expire"] {
            assert!(answer.body.contains(word), "{word}: {}", answer.body);
        }
    });
}

#[test]
fn metrics() {
    both(|lab| {
        modes(
            lab,
            "local.server.authentication\nauth.username = u\nauth.password = p",
            |_, sets| {
                let get = || curl("-u u:p", "GET /metrics", &format!("http://{LOCAL}"));
                let shows = |line: &str| get().lines().any(|found| found == line);
                for address in ["1.1.1.1?expire=1", "1.1.1.2", "2001:db8::1"] {
                    curl(
                        "-u u:p",
                        &format!("PUT /drop/input/any/{address}"),
                        &format!("http://{LOCAL}"),
                    );
                }
                curl("-u u:q", "GET /", &format!("http://{LOCAL}"));
                // Before the third PUT, there were two as well.
                await_repair("one expires", 4 + SLACK, || match sets {
                    true => lab.entries().len() == 2,
                    false => !lab.rules().is_empty() && shows("rfw_expired_rules_total 1"),
                });
                await_repair("two are left", 4 + SLACK, || {
                    !lab.rules().is_empty()
                        && shows("rfw_rules{chain=\"INPUT\",target=\"DROP\",tag=\"\"} 2")
                });
                assert!(
                    shows("rfw_refused_logins_total 2"),
                    "the first is await_ready's: {}",
                    get()
                );
                assert!(shows("rfw_batches_total 3"), "{}", get());
                // The previous one may still be closing.
                await_true("no other connection", SLACK, || shows("rfw_connections 1"));
                lab.iptables("-F");
                await_repair("put back", 4 + SLACK, || {
                    !lab.rules().is_empty() && shows("rfw_restored_rules_total 1")
                });
            },
        );
    });
}

#[test]
fn non_restful() {
    both(|lab| {
        let rule = "GET /drop/input/any/1.2.3.4";
        let rows = [
            ("?modify=insert", "200 inserted"),
            ("?modify=insert&expire=1h", "200 refreshed"),
            ("?modify=delete&expire=1h", "400 bad_query"),
            ("?modify=other", "400 bad_query"),
            ("?modify=delete", "200 deleted"),
            ("?modify=delete&wait=true", "200 absent"),
        ];
        let mut rfw = lab.start("local.server\nnon.restful");
        table(&rows, |query| ask(&format!("{rule}{query}")).brief());
        transcript(&[("PUT /drop/input/any/1.2.3.4", "200 inserted"), ("GET /list", "200")]);
        rfw.kill();
        let _rfw = lab.start("local.server");
        transcript(&[("GET /drop/input/any/1.2.3.4?modify=delete", "405 method_not_allowed")]);
        assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
    });
}

#[test]
fn whitelist() {
    both(|lab| {
        lab.write("white.list", "# mine\n10.0.0.0/8\n198.51.100.4-198.51.100.9\n2001:db8::/48\n\n");
        let _rfw = lab.start("local.server");
        transcript(&[
            ("PUT /drop/input/any/10.1.2.3", "409 whitelisted"),
            ("PUT /drop/input/any/11.0.0.0/9", "200 inserted"),
            ("PUT /drop/input/any/198.51.100.3", "200 inserted"),
            ("PUT /drop/input/any/198.51.100.4", "409 whitelisted"),
            ("PUT /drop/input/any/198.51.100.9", "409 whitelisted"),
            ("PUT /drop/input/any/198.51.100.10", "200 inserted"),
            ("PUT /drop/input/any/198.51.0.0/16", "409 whitelisted"),
            ("PUT /drop/output/any/2001:db8:0:1::1", "409 whitelisted"),
            ("PUT /drop/output/any/2001:db8::/32", "409 whitelisted"),
            ("PUT /drop/output/any/2001:db8:1::1", "200 inserted"),
            ("PUT /drop/input/any/::ffff:10.1.2.3", "409 whitelisted"),
            ("DELETE /drop/input/any/10.1.2.3", "409 whitelisted"),
            ("PUT /drop/forward/any/0.0.0.0/any/5.6.7.8", "200 inserted"),
            ("PUT /drop/forward/any/0.0.0.0/any/10.6.7.8", "409 whitelisted"),
        ]);
    });
}

/// iptables-legacy holds the xtables lock until its output is read. rfw reads it at once, so clients
/// that never read their listing, which exceeds the kernel's buffers, delay no change.
#[test]
fn unread_listings_delay_no_change() {
    legacy(|lab| {
        lab.seed(65_000, "rfw");
        let _rfw = lab.start("local.server");
        let began = Instant::now();
        assert_eq!(ask("GET /list").status, 200);
        let alone = began.elapsed();
        let mut unread: Vec<Conn> = (0..8).map(|_| Conn::open()).collect();
        for conn in &mut unread {
            conn.send("GET /list HTTP/1.1\r\nHost: localhost\r\n\r\n");
        }
        await_true("as many begin as rfw sends at a time", 10 + SLACK, || {
            let begun = sh("ss -Htn dport = :7390 | awk '$2 > 0' | wc -l");
            begun.trim().parse::<usize>().unwrap() >= 4
        });
        let began = Instant::now();
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4").status, 200);
        let limit = Duration::from_secs(3) + 9 * alone;
        assert!(began.elapsed() < limit, "{:?}, not within {limit:?}", began.elapsed());
        assert_eq!(ask("GET /list/output").brief(), "200", "a short one is sent at once");
    });
}
