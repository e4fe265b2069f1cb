//! HTTP/1.1 byte by byte, on raw sockets: the status or the end of each malformed request.

use crate::lab::*;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

const PUT: &str = "PUT /drop/input/any/6.6.6.6 HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A head (`|` is CRLF, `@` a valid Host line) and its status, "closed" if the connection is closed.
const HEADS: [(&str, &str); 64] = [
    ("GET / HTTP/1.1|@|", "200"),
    ("GET / HTTP/1.0|@|", "200 closed"),
    ("GET / HTTP/1.1|@Connection: close||", "200 closed"),
    ("GET / HTTP/1.1|@connection: foo, CLOSE||", "200 closed"),
    ("GET / HTTP/1.1|hOsT:   LocalHost:7390 \t ||", "200"),
    ("GET / HTTP/1.1|Host: 127.0.0.1||", "200"),
    ("GET / HTTP/1.1|Host: [::1]:7390||", "200"),
    ("GET / HTTP/1.1|@Content-Length: 0||", "200"),
    ("GET / HTTP/1.1|@X-Y: a\tb \u{e9} \"c\"||", "200"),
    ("GET / HTTP/1.1|@X:||", "200"),
    ("GET / HTTP/1.1||", "400 closed"),
    ("GET / HTTP/1.0||", "400 closed"),
    ("GET / HTTP/1.1|Host: example.com||", "400"),
    ("GET / HTTP/1.1|Host: localhost.example.com||", "400"),
    ("GET / HTTP/1.1|Host: localhost:80||", "200"),
    ("GET / HTTP/1.1|Host: [::1]:8080||", "200"),
    ("GET / HTTP/1.1|Host: example.com:7390||", "400"),
    ("GET / HTTP/1.1|Host: localhost:||", "400"),
    ("GET / HTTP/1.1|Host: 127.0.0.2||", "400"),
    ("GET / HTTP/1.1|Host: ::1||", "400 closed"),
    ("GET / HTTP/1.1|Host:||", "400"),
    ("GET / HTTP/1.1|Host: localhost, localhost||", "400 closed"),
    ("GET / HTTP/1.1|@@|", "400 closed"),
    ("GET / HTTP/1.1\n@|", "400 closed"),
    ("GET / HTTP/1.1|Host: localhost\n|", "400 closed"),
    ("GET / HTTP/1.1|@\n", "400 closed"),
    ("GET / HTTP/1.1|@X: a\rb||", "400 closed"),
    ("GET / HTTP/1.1|@X: a\0b||", "400 closed"),
    ("GET / HTTP/1.1|@X: a\u{7f}b||", "400 closed"),
    ("GET / HTTP/1.1|@X: a|\tb: c||", "400 closed"),
    ("GET / HTTP/1.1|\tX: y|@|", "400 closed"),
    ("GET / HTTP/1.1|@X : y||", "400 closed"),
    ("GET / HTTP/1.1|@X||", "400 closed"),
    ("GET / HTTP/1.1|@: y||", "400 closed"),
    ("GET / HTTP/1.1|@X(y): z||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: 0|Content-Length: 0||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: 0|Transfer-Encoding: chunked||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: 0, 0||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: +0||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: -1||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: 0x1||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length:||", "400 closed"),
    ("GET / HTTP/1.1|@Transfer-Encoding: chunked|Transfer-Encoding: chunked||", "501 closed"),
    ("GET / HTTP/1.0|@Transfer-Encoding: chunked||", "400 closed"),
    ("GET / HTTP/1.1|@Content-Length: 5||12345", "413 closed"),
    ("GET / HTTP/1.1|@Transfer-Encoding: chunked||0||", "413 closed"),
    ("GET / HTTP/1.1|@Expect: 100-continue|Content-Length: 5||", "413 closed"),
    ("GET / HTTP/1.1|@Expect: 100-continue||", "200"),
    ("GET / HTTP/1.1|@Expect: more||", "417 closed"),
    ("GET / HTTP/1.1|@Transfer-Encoding: gzip, chunked||", "501 closed"),
    ("GET / HTTP/1.1|@Transfer-Encoding: chunked, chunked||", "501 closed"),
    ("GET / HTTP/2.0|@|", "505 closed"),
    ("GET / HTTP/3|@|", "400 closed"),
    ("GET / http/1.1|@|", "400 closed"),
    ("GET / HTTP/1.1 |@|", "400 closed"),
    ("GET  / HTTP/1.1|@|", "400 closed"),
    ("GET\t/ HTTP/1.1|@|", "400 closed"),
    (" GET / HTTP/1.1|@|", "400 closed"),
    ("GET /|@|", "400 closed"),
    ("GET list HTTP/1.1|@|", "400 closed"),
    ("GET /list#x HTTP/1.1|@|", "400 closed"),
    ("GET /\u{e9} HTTP/1.1|@|", "400 closed"),
    ("G(T / HTTP/1.1|@|", "400 closed"),
    ("\u{16}\u{3}\u{1}\u{2}||", "400 closed"),
];

#[test]
fn heads() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        table(&HEADS, |head| {
            let mut conn = Conn::open();
            conn.send(head.replace('@', "Host: localhost|").replace('|', "\r\n"));
            let status = conn.answer().map_or("none".into(), |answer| answer.status.to_string());
            conn.send(PUT);
            match conn.answer() {
                Ok(_) => status,
                Err(_) => format!("{status} closed"),
            }
        });
        let mut conn = Conn::open();
        conn.send(format!("GET / HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n{PUT}"));
        assert_eq!(conn.rest().matches("HTTP/1.1 ").count(), 1);
    });
}

#[test]
fn limits() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let line =
            |n: usize| format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(n - 14));
        let start = "GET / HTTP/1.1\r\nHost: localhost\r\n";
        let head = |n: usize| format!("{start}X: {}\r\n\r\n", "a".repeat(n - start.len() - 7));
        let fields = |n: usize| format!("{start}{}\r\n", "X: y\r\n".repeat(n - 1));
        let rows = [
            ("a request line of 8 KiB", line(8192), 404),
            ("and one more", line(8193), 414),
            ("one that does not end", "a".repeat(8193), 414),
            ("a head of 16 KiB", head(16_384), 200),
            ("and one more", head(16_385), 431),
            ("one that does not end", start.to_string() + &"a".repeat(16_385 - start.len()), 431),
            ("64 fields", fields(64), 200),
            ("and one more", fields(65), 431),
        ];
        for (what, bytes, status) in rows {
            let mut conn = Conn::open();
            conn.send(bytes);
            assert_eq!(conn.answer().unwrap().status, status, "{what}");
        }
    });
}

#[test]
fn a_connection_is_kept_alive_and_serves_requests_in_order() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let mut conn = Conn::open();
        (0..300).for_each(|_| assert_eq!(conn.ask("GET /list").body, "[]\n"));

        let list = "GET /list HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let delete = PUT.replace("PUT", "DELETE");
        let wire = [PUT, list, &delete, list].concat();
        conn.send(&wire);
        let mut answers = || (0..4).map(|_| conn.answer().unwrap()).collect::<Vec<_>>();
        let bodies: Vec<_> = answers().iter().map(|a| a.body.matches("6.6.6.6").count()).collect();
        assert_eq!(bodies, [1, 1, 1, 0]);

        let mut conn = Conn::to("[::1]:7390").unwrap();
        wire.bytes().for_each(|byte| conn.send([byte]));
        let bodies = (0..4).map(|_| conn.answer().unwrap().body.matches("6.6.6.6").count());
        assert_eq!(bodies.collect::<Vec<_>>(), [1, 1, 1, 0]);
    });
}

/// Sends `bytes`, one every 500 ms, until the server closes; returns its response and the time.
fn trickle(mut conn: Conn, bytes: &str) -> (String, u64) {
    let from = Instant::now();
    let rest = thread::scope(|scope| {
        let mut writer = conn.writer();
        scope.spawn(move || {
            for byte in bytes.bytes() {
                if writer.write_all(&[byte]).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(500));
            }
        });
        conn.rest()
    });
    (rest.lines().next().unwrap_or("").into(), from.elapsed().as_secs())
}

#[test]
fn a_slow_head_has_one_deadline_and_delays_no_one() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let mut kept = Conn::open();
        assert_eq!(kept.ask("GET /").status, 200);
        let slow = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let rows = [
            ("nothing", Conn::open(), "", ""),
            ("nothing more", kept, "", ""),
            ("a part", Conn::open(), "G", "HTTP/1.1 408 "),
            ("byte after byte", Conn::open(), slow, "HTTP/1.1 408 "),
        ];
        thread::scope(|scope| {
            for (what, conn, bytes, want) in rows {
                scope.spawn(move || {
                    let (said, seconds) = trickle(conn, bytes);
                    assert!(
                        said.starts_with(want) && want.is_empty() == said.is_empty(),
                        "{what}: {said}"
                    );
                    assert!((8..=10 + SLACK).contains(&seconds), "{what}: {seconds} s");
                });
            }
            assert_eq!(ask("PUT /drop/input/any/6.6.6.6").brief(), "200 inserted");
        });
    });
}

#[test]
fn the_connection_that_idles_longest_is_evicted_for_the_129th() {
    once(|lab| {
        let rfw = lab.start("local.server");
        rfw.await_idle();
        let mut kept: Vec<_> = (0..128).map(|_| Conn::open()).collect();
        // The second one is the only one that does not ask again. Each time, all threads wait for their
        // clients again, in a fraction of the ten seconds after which rfw closes.
        for but in [None, Some(1)] {
            let others = kept.iter_mut().enumerate().filter(|(n, _)| Some(*n) != but);
            others.for_each(|(_, conn)| assert_eq!(conn.ask("GET /").status, 200));
            rfw.await_queued();
        }
        assert_eq!(Conn::open().ask("GET /list").status, 200);
        assert_eq!(kept.remove(1).rest(), "");
        kept.iter_mut().for_each(|conn| assert_eq!(conn.ask("GET /").status, 200));
    });
}
