//! Each defect of rfw 0.2.2 that must not return, by name.

use crate::lab::*;
use std::net::TcpStream;
use std::thread;

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
