//! Each defect of rfw 0.2.2 that must not return, by name; then defects of other programs.

use crate::faults::held;
use crate::lab::*;
use crate::tls;
use std::fs;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

#[test]
fn it_answered_200_before_iptables_ran() {
    both(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        lab.stand_in_for_changes("/bin/sleep 1");
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 inserted");
        assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
    });
}

#[test]
fn its_worker_was_dead_after_one_failure_while_200s_went_on() {
    both(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        lab.stand_in("echo 'iptables: Bad luck.' >&2; exit 1");
        transcript(&[
            ("PUT /drop/input/any/1.2.3.4", "500 iptables_failed"),
            ("PUT /drop/input/any/1.2.3.4", "500 iptables_failed"),
        ]);
        lab.stand_in("");
        transcript(&[("PUT /drop/input/any/1.2.3.4", "200 inserted")]);
        assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
    });
}

#[test]
fn the_interface_never_reached_iptables() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/eth0/1.2.3.4");
        ask("PUT /drop/forward/eth0/1.2.3.4/ppp");
        let rules = [
            "INPUT -s 1.2.3.4/32 -i eth0 -j DROP [rfw]",
            "FORWARD -s 1.2.3.4/32 -i eth0 -o ppp+ -j DROP [rfw]",
        ];
        assert_eq!(lab.rules(), rules);
    });
}

#[test]
fn the_list_was_empty_with_iptables_1_8() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/any/1.2.3.4");
        assert_eq!(ask("GET /list").field("source"), "1.2.3.4");
    });
}

#[test]
fn rules_doubled_after_a_restart() {
    both(|lab| {
        let mut rfw = lab.start("local.server");
        for expected in ["200 inserted", "200 exists", "200 exists"] {
            assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), expected);
            assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
            rfw.restart();
        }
    });
}

#[test]
fn timed_rules_became_permanent_after_a_restart() {
    both(|lab| {
        let mut rfw = lab.start("local.server");
        let expires = ask("PUT /drop/input/any/1.2.3.4?expire=3").expires();
        ask("PUT /drop/input/any/2001:db8::1?expire=3");
        rfw.restart();
        assert!(lab.rules().len() == 2 || now() >= expires, "early");
        await_true("two rules expire", 5 + SLACK, || lab.rules().is_empty());
    });
}

#[test]
fn at_most_one_rule_expired_per_second() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let mut conn = Conn::open();
        let mut last = 0;
        for n in 0..30 {
            last = conn.ask(&format!("PUT /drop/input/any/10.0.0.{n}?expire=3")).expires();
        }
        assert!(!lab.rules().is_empty());
        await_time(last);
        await_true("all thirty expire", 2 + SLACK, || lab.rules().is_empty());
    });
}

#[test]
fn a_delete_left_the_old_expiry_behind_for_a_new_permanent_rule() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let expires = ask("PUT /drop/input/any/1.2.3.4?expire=2").expires();
        transcript(&[
            ("DELETE /drop/input/any/1.2.3.4", "200 deleted"),
            ("PUT /drop/input/any/1.2.3.4?expire=0", "200 inserted"),
        ]);
        await_time(expires + 3);
        assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
    });
}

#[test]
fn one_idle_connection_blocked_everybody() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let _idle = TcpStream::connect(LOCAL).unwrap();
        let mut half = Conn::open();
        half.send("PUT /drop");
        assert_eq!(ask("PUT /drop/input/any/1.2.3.4").brief(), "200 inserted");
    });
}

#[test]
fn host_bits_made_two_rules_of_one() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        transcript(&[
            ("PUT /drop/input/any/7.7.7.77/24", "200 inserted"),
            ("PUT /drop/input/any/7.7.7.0/24", "200 exists"),
            ("DELETE /drop/input/any/7.7.7.1/24", "200 deleted"),
        ]);
        assert_eq!(lab.rules(), [""; 0]);
    });
}

#[test]
fn with_the_outward_server_off_it_did_not_start() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        assert_eq!(ask("GET /list").brief(), "200");
        assert!(TcpStream::connect(OUTWARD).is_err());
    });
}

#[test]
fn local_authentication_was_never_enforced() {
    once(|lab| {
        let keys = "local.server.authentication\nauth.username = mu\nauth.password = secret";
        let _rfw = lab.start(&format!("local.server\n{keys}"));
        let put = "PUT /drop/input/any/1.2.3.4";
        let rows = [
            ("", "401 unauthorized"),
            ("Authorization: Basic bXU6d3Jvbmc=\r\n", "401 unauthorized"), // mu:wrong
            ("Authorization: Basic bXU6c2VjcmV0\r\n", "200 inserted"),     // mu:secret
        ];
        table(&rows, |fields| Conn::open().try_ask(put, fields).unwrap().brief());
    });
}

#[test]
fn every_put_at_debug_logged_the_whole_expiry_queue() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let mut growth = |n: usize| {
            let before = lab.read("rfw.log").len();
            let mut conn = Conn::open();
            conn.ask(&format!("PUT /drop/input/any/10.0.0.{n}?expire=1h"));
            let line = format!("10.0.0.{n}?");
            await_true("a line in the log", SLACK, || lab.read("rfw.log").contains(&line));
            lab.read("rfw.log").len() - before
        };
        let sizes: Vec<usize> = (100..200).map(&mut growth).collect();
        let (first, last) = (sizes[0], sizes[99]);
        assert!(last < first + 200, "{first} bytes at first, {last} at last");
    });
}

#[test]
fn thirty_two_clients_at_once_lose_nothing() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        thread::scope(|scope| {
            for client in 0..32 {
                scope.spawn(move || {
                    let mut conn = Conn::open();
                    for n in 0..10 {
                        let request = format!("PUT /drop/input/any/10.0.{client}.{n}");
                        assert_eq!(conn.ask(&request).brief(), "200 inserted");
                    }
                });
            }
        });
        let mut rules = lab.rules();
        rules.sort();
        rules.dedup();
        assert_eq!(rules.len(), 320);
    });
}

// Defects of other programs. The changes made by iptables are in `lab.read("calls")`.
const RECORD: &str = "echo \"$me $*\" >> $lab/calls";

/// rfw's memory in kB, and hundredths of a second of processor time.
fn spent(rfw: &Rfw) -> (usize, u64) {
    let stat = fs::read_to_string(format!("/proc/{}/stat", rfw.pid())).unwrap();
    let times = stat.rsplit(')').next().unwrap().split(' ').skip(12).take(2);
    (rfw.memory("VmHWM") / 1024, times.map(|ticks| ticks.parse::<u64>().unwrap()).sum())
}

/// tiny_http allocated the memory that a Content-Length announced, and aborted.
#[test]
fn tiny_http_aborted_on_a_huge_content_length() {
    once(|lab| {
        let rfw = lab.start("local.server");
        let before = spent(&rfw).0;
        for length in
            ["67108865", "9223372036854775807", "18446744073709551615", "1844674407370955161699"]
        {
            for path in ["PUT /drop/input/any", "PUT /drop/input/any/1.2.3.4", "GET /list"] {
                let field = format!("Content-Length: {length}\r\n");
                let status = Conn::open().try_ask(path, &field).unwrap().status;
                assert!([400, 413].contains(&status), "{path} {length}: {status}");
            }
        }
        assert!(spent(&rfw).0 < before + 2_000, "{before} kB, then {} kB", spent(&rfw).0);
    });
}

/// CVE-2024-32650: a ClientHello followed by a close_notify put rustls in an endless loop.
#[test]
fn rustls_looped_on_a_hello_and_a_close_notify() {
    once(|lab| {
        tls::keys(lab);
        let rfw = lab.start(tls::CONF);
        let hello = tls::client_hello();
        for _ in 0..4 {
            let mut conn = Conn::to(OUTWARD).unwrap();
            conn.send(&hello);
            conn.send([0x15, 3, 3, 0, 2, 1, 0]); // alert, warning, close_notify
            conn.rest();
        }
        let before = spent(&rfw).1;
        thread::sleep(Duration::from_secs(1)); // the time to be measured
        let used = spent(&rfw).1 - before;
        assert!(used < 20, "{used} hundredths of a second of a processor");
    });
}

/// CVE-2007-4321, CVE-2013-2178: a client's text looked like a line or an address in the log, and
/// fail2ban banned the address that the client had chosen.
#[test]
fn fail2ban_read_forged_lines_of_logs() {
    once(|lab| {
        let keys = "local.server.authentication\nauth.username = mu\nauth.password = secret";
        let _rfw = lab.start(&format!("local.server\n{keys}"));
        let forged = "2026-01-01T00:00:00.000Z INFO 9.9.9.9 mu \"PUT /drop\" 401 unauthorized";
        let escaped = forged.replace(' ', "%20").replace('"', "%22");
        for path in [
            format!("/{escaped}"),
            format!("/drop/input/any/%0d%0a{escaped}"),
            "/drop/input/any/1.1.1.1%22%20401%20unauthorized%20from%209.9.9.9".into(),
        ] {
            for user in [format!("9.9.9.9 {forged}"), format!("mu\n{forged}")] {
                let basic = sh(&format!("printf '%s:x' '{user}' | base64 -w 0"));
                let fields = format!("Authorization: Basic {basic}\r\nX: {forged}\r\n");
                assert_eq!(
                    Conn::open().try_ask(&format!("PUT {path}"), &fields).unwrap().status,
                    401
                );
            }
        }
        let log = || lab.read("rfw.log");
        // The first one is that of `await_ready`.
        await_true("seven lines", SLACK, || log().matches("\" 401 unauthorized ").count() == 7);
        for line in log().lines() {
            let outside: String = line.split('"').step_by(2).collect();
            assert!(!outside.contains("9.9.9.9") && !line.starts_with("2026-01-01"), "{line}");
            assert!(
                !line.contains(" 401 ") || line[25..].starts_with("INFO 127.0.0.1 - \""),
                "{line}"
            );
        }
    });
}

/// CVE-2021-32749: fail2ban mailed the output of whois, whose `~!` lines mail executed as commands.
#[test]
fn fail2ban_ran_the_output_of_a_helper() {
    once(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        let evil = r#"$(touch pwned) `touch pwned`
~! touch pwned
"}, {"result":"inserted"}
2026-01-01T00:00:00.000Z INFO forged \u001b[31m"#;
        lab.write_data("words", &evil.replace(r"\u001b", "\u{1b}"));
        lab.stand_in_for_changes("/bin/cat $lab/words >&2; exit 1");
        let answer = ask("PUT /drop/input/any/1.2.3.4");
        assert_eq!(answer.brief(), "500 iptables_failed");
        assert_eq!(answer.body.matches('\n').count(), 1, "{answer:?}");
        assert!(!answer.body.contains('\u{1b}') && answer.body.contains("\\\"}, {\\\"result"));
        await_true("the log has it", SLACK, || lab.read("rfw.log").contains("touch pwned"));
        let log = lab.read("rfw.log");
        assert!(!log.contains('\u{1b}') && !log.contains("\n~!") && !log.contains("\n2026-01-01"));
        // Other programs may remove files meanwhile, which find reports as a failure.
        let found = sh("find / -xdev -name pwned 2>/dev/null || true; find /run -name pwned");
        assert_eq!(found, "");
    });
}

/// CVE-2022-30525: Zyxel's firewalls put a field of a request into a command line. CVE-2021-1518:
/// Cisco's Firepower Device Manager executed a parameter of its REST API.
#[test]
fn zyxel_and_cisco_put_a_clients_bytes_into_commands() {
    once(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        lab.stand_in_for_changes(RECORD);
        for evil in [
            "eth0;id",
            "eth0%3bid",
            "$(id)",
            "%60id%60",
            "eth0%0aid",
            "eth0%00",
            "-j",
            "--jump=ACCEPT",
            "eth0%20-j%20ACCEPT",
            "..",
            "%2e%2e",
            "eth0%2f..",
            "%252f",
            "%ff",
            "'",
            "%22",
            "%7c%7cid",
            "!",
        ] {
            let paths = [
                format!("/drop/input/{evil}/1.2.3.4"),
                format!("/drop/input/any/{evil}"),
                format!("/drop/input/any/1.2.3.4{evil}"),
                format!("/drop/input/any/1.2.3.4/{evil}"),
                format!("/drop{evil}/input/any/1.2.3.4"),
                format!("/drop/input{evil}/any/1.2.3.4"),
                format!("/drop/forward/any/1.2.3.4/{evil}/5.6.7.8"),
                format!("/drop/input/any/1.2.3.4?expire={evil}"),
            ];
            for path in paths {
                let status = ask(&format!("PUT {path}")).status;
                assert!((400..500).contains(&status), "{path}: {status}");
            }
        }
        assert_eq!(lab.read("calls"), "");
        assert_eq!(lab.rules(), [""; 0]);
    });
}

/// CVE-2026-4948: users with read access to firewalld could call methods that write.
#[test]
fn firewalld_let_readers_write() {
    once(|lab| {
        lab.stand_in("");
        let _rfw = lab.start("local.server");
        ask("PUT /drop/input/any/9.9.9.9");
        let rules = lab.rules();
        lab.stand_in_for_changes(RECORD);
        let override_ =
            "X-HTTP-Method-Override: PUT\r\nX-HTTP-Method: DELETE\r\nX-Method-Override: PUT\r\n";
        for method in ["GET", "HEAD", "OPTIONS", "POST", "PATCH", "put", "TRACE", "PROPFIND"] {
            for path in [
                "/drop/input/any/1.2.3.4",
                "/drop/input/any/9.9.9.9",
                "/drop/input/any/1.2.3.4?modify=insert",
                "/drop/input/any/9.9.9.9?modify=delete",
                "/drop/input/any/1.2.3.4?_method=PUT",
                "/drop/input/any",
                "/list",
                "/list/input?expire=1",
                "/",
                "/?modify=insert",
            ] {
                let mut conn = Conn::open();
                conn.send(format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{override_}\r\n"));
                assert!(conn.rest().starts_with("HTTP/1.1 "), "{method} {path}");
            }
        }
        assert_eq!((lab.read("calls").as_str(), lab.rules()), ("", rules));
    });
}

/// FreeBSD's blocklistd leaked a socket for each client, until it had none left.
#[test]
fn blocklistd_leaked_sockets() {
    once(|lab| {
        tls::keys(lab);
        let rfw = lab.start(&format!("local.server\n{}", tls::CONF));
        ask("PUT /drop/input/any/1.2.3.4");
        rfw.await_idle();
        let before = held(&rfw);
        let hello = tls::client_hello();
        let close = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let endings: [(&str, &[u8], bool); 8] = [
            (LOCAL, b"", false),
            (LOCAL, b"PUT /drop", false),
            (LOCAL, b"nonsense\n", true),
            (LOCAL, close.as_bytes(), true),
            (
                LOCAL,
                b"PUT /drop/input/any HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1.1.",
                false,
            ),
            (OUTWARD, b"", false),
            (OUTWARD, &hello, false),
            (OUTWARD, b"nonsense\n", true),
        ];
        for _ in 0..100 {
            for (address, bytes, read) in endings {
                let mut conn = Conn::to(address).unwrap();
                conn.send(bytes);
                if read {
                    conn.rest();
                }
            }
        }
        await_true("as before", 2 + SLACK, || held(&rfw) == before);
    });
}

/// nginx compared passwords up to the first NUL: it accepted `password\0junk` for `password`.
#[test]
fn nginx_took_a_password_and_nul_and_junk() {
    once(|lab| {
        let keys = "local.server.authentication\nauth.username = mu\nauth.password = secret";
        let _rfw = lab.start(&format!("local.server\n{keys}"));
        let rows = [
            (r"mu:secret", "200"),
            (r"mu:secret\000junk", "401 unauthorized"),
            (r"mu:secret\000", "401 unauthorized"),
            (r"mu\000x:secret", "401 unauthorized"),
            (r"mu:\000secret", "401 unauthorized"),
            (r"mu:secret\n", "401 unauthorized"),
        ];
        table(&rows, |given| {
            let basic = sh(&format!("printf '{given}' | base64 -w 0"));
            let fields = format!("Authorization: Basic {basic}\r\n");
            Conn::open().try_ask("GET /list", &fields).unwrap().brief()
        });
    });
}
