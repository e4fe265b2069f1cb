//! Slow, greedy and malicious clients: they are evicted or refused, and every other one gets its turn.

use crate::lab::*;
use crate::tls;
use rfw::http::deadline::DeadlineSocket;
use rfw::http::tls::Connector;
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PUT: &str = "PUT /drop/input/any/6.6.6.6";
const UPLOAD: &str =
    "PUT /drop/input/any HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n1";
const LISTING: &str = "GET /list HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A list of this many addresses.
fn addresses(count: usize) -> String {
    (0..count).map(|n| format!("10.{}.{}.{}\n", n >> 16, n >> 8 & 255, n & 255)).collect()
}

/// Sends an upload's head and a byte, and a byte now and then until the test ends.
fn drip(is_over: &AtomicBool) {
    let Ok(conn) = Conn::to(LOCAL) else { return };
    let mut writer = conn.writer();
    let mut is_open = writer.write_all(UPLOAD.as_bytes()).is_ok();
    while is_open && !is_over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100));
        is_open = writer.write_all(b"1").is_ok();
    }
}

#[test]
fn stalled_uploads_delay_no_list() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let mut stalled: Vec<_> = (0..17).map(|_| Conn::open()).collect();
        stalled.iter_mut().for_each(|conn| conn.send(UPLOAD));
        assert_eq!(list("PUT /drop/input/any", addresses(100)).sums(), "inserted 100");
        // Nor do uploads that arrive byte by byte.
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            (0..24).for_each(|_| drop(scope.spawn(|| drip(&is_over))));
            for _ in 0..3 {
                assert_eq!(list("PUT /drop/input/any", addresses(100)).sums(), "exists 100");
            }
            is_over.store(true, Ordering::Relaxed);
        });
    });
}

/// Even at more than 1 KiB/s, which is fast enough for a short one.
#[test]
fn an_upload_that_takes_over_a_minute_is_refused() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let begin = Instant::now();
        let mut conn = Conn::open();
        conn.send(UPLOAD);
        let mut writer = conn.writer();
        let answer = thread::scope(|scope| {
            scope.spawn(move || {
                while writer.write_all(&[b'\n'; 650]).is_ok() {
                    thread::sleep(Duration::from_millis(500));
                }
            });
            loop {
                match conn.answer() {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    answer => break answer,
                }
            }
        });
        assert_eq!(answer.unwrap().brief(), "408 request_timeout");
        let seconds = begin.elapsed().as_secs();
        assert!((59..=61 + SLACK).contains(&seconds), "{seconds} s");
    });
}

#[test]
fn unread_listings_delay_no_listing() {
    legacy(|lab| {
        let rfw = lab.start("local.server");
        assert_eq!(list("PUT /drop/input/any", addresses(30_000)).sums(), "inserted 30000");
        let unread = || {
            let mut conn = Conn::open();
            conn.send(LISTING);
            assert_eq!(conn.writer().peek(&mut [0]).unwrap(), 1, "it begins");
            conn
        };
        let _unread = [unread(), unread(), unread(), unread()];
        for _ in 0..2 {
            let answer = ask("GET /list");
            assert_eq!((answer.status, answer.body.matches("\"num\"").count()), (200, 30_000));
        }
        let memory = std::fs::read_to_string(format!("/proc/{}/status", rfw.pid())).unwrap();
        let most = memory.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let most: u64 = most.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(most < 80_000, "{most} kB");
    });
}

/// It waited for a slot like the listing of all addresses.
#[test]
fn unread_listings_delay_no_query_for_an_address() {
    once(|lab| {
        let _rfw = lab.start(&format!("local.server\n{SETS}"));
        assert_eq!(list("PUT /drop/input/any", addresses(30_000)).sums(), "inserted 30000");
        await_true("they are counted", 3 + SLACK, || {
            ask("GET /metrics").body.contains("target=\"DROP\",tag=\"\"} 30000")
        });
        let mut unread = [Conn::open(), Conn::open(), Conn::open(), Conn::open()];
        unread.iter_mut().for_each(|conn| conn.send(LISTING));
        unread.iter_mut().for_each(|conn| assert_eq!(conn.writer().peek(&mut [0]).unwrap(), 1));
        let begin = Instant::now();
        let answer = ask("GET /list?ip=10.0.0.7");
        let took = begin.elapsed();
        assert_eq!((answer.status, answer.body.matches("\"num\"").count()), (200, 1));
        // Without a slot, it would wait until one of the others can be evicted.
        assert!(took < Duration::from_millis(1_500), "{took:?}");
        assert_eq!(ask("GET /list?ip=10.0.0.0/9").body.matches("\"num\"").count(), 30_000);
    });
}

#[test]
fn concurrent_listings_all_get_their_turn() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        list("PUT /drop/input/any", addresses(50));
        thread::scope(|scope| {
            for _ in 0..64 {
                scope.spawn(|| {
                    let mut conn = Conn::open();
                    conn.send(LISTING.repeat(5));
                    (0..5).for_each(|_| assert_eq!(conn.answer().unwrap().status, 200));
                });
            }
        });
    });
}

/// Connections that all list a table of which iptables needs a moment held every slot of the listener.
#[test]
fn a_crowd_that_lists_delays_no_change() {
    once(|lab| {
        lab.stand_in("case \"$*\" in *-S*) /bin/sleep 0.2 ;; esac");
        let _rfw = lab.start("local.server");
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..200 {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        let _ = Conn::open().try_ask("GET /list?tag=x", "");
                    }
                });
            }
            let mut statuses = Vec::new();
            for _ in 0..5 {
                statuses.push(Conn::open().try_ask(PUT, "").map_or(0, |answer| answer.status));
            }
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(statuses, [200; 5]);
        });
    });
}

#[test]
fn a_listing_that_waits_for_rfw_is_not_evicted() {
    once(|lab| {
        lab.stand_in("case \"$*\" in *-S*) /bin/sleep 0.4 ;; esac");
        let _rfw = lab.start("local.server");
        list("PUT /drop/input/any", addresses(150));
        await_true("they are counted", 3 + SLACK, || {
            ask("GET /metrics").body.contains("target=\"DROP\",tag=\"\"} 150")
        });
        thread::scope(|scope| {
            for _ in 0..8 {
                // Each is answered, if only with 503 after 5 s.
                scope.spawn(|| Conn::open().try_ask("GET /list", "").unwrap());
            }
        });
    });
}

/// The outcome of a crowd's requests: how many changes were made, and how many refused.
#[derive(Default)]
struct Crowd {
    made: AtomicUsize,
    refused: AtomicUsize,
    is_over: AtomicBool,
}

impl Crowd {
    /// Requests changes without a pause, on a new connection whenever rfw closes the old one.
    /// Returns how many were made.
    fn ask(&self, client: usize) -> usize {
        let (mut conn, mut made) = (Conn::open(), 0);
        while !self.is_over.load(Ordering::Relaxed) {
            match conn.try_ask(&format!("PUT /drop/input/any/10.0.{client}.{}", made % 8), "") {
                Ok(answer) if answer.status == 200 => {
                    made += 1;
                    self.made.fetch_add(1, Ordering::Relaxed);
                    if answer.header("Connection") == Some("close") {
                        conn = Conn::open();
                    }
                }
                Ok(_) => drop(self.refused.fetch_add(1, Ordering::Relaxed)),
                Err(_) => conn = Conn::open(),
            }
        }
        made
    }
}

#[test]
fn each_of_200_clients_that_never_pause_gets_its_share() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let (crowd, mut honest) = (Crowd::default(), Vec::new());
        let made: Vec<usize> = thread::scope(|scope| {
            let crowd = &crowd;
            let clients = (0..200).map(|n| scope.spawn(move || crowd.ask(n)));
            let clients: Vec<_> = clients.collect();
            let refused = || crowd.refused.load(Ordering::Relaxed);
            while crowd.made.load(Ordering::Relaxed) < 4_000 && refused() == 0 {
                honest.push(Conn::open().try_ask(PUT, "").map(|answer| answer.status));
            }
            crowd.is_over.store(true, Ordering::Relaxed);
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        assert!(honest.iter().all(|status| matches!(status, Ok(200))), "{honest:?}");
        assert_eq!(crowd.refused.into_inner(), 0);
        let least = made.iter().min().unwrap();
        assert!(*least >= 5, "{least} for one of 200, 20 for each on average");
    });
}

/// With net.ipv4.conf.*.route_localnet, a neighbour reached 127.0.0.1 (CVE-2020-8558).
#[test]
fn the_local_server_is_only_for_this_host() {
    once(|lab| {
        sh("ip addr add 10.9.9.9/32 dev lo");
        let _rfw = lab.start("local.server");
        let code = "-w %{http_code} -o /dev/null -s";
        let get =
            |from: &str| sh(&format!("curl {code} --interface {from} http://127.0.0.1:7390/ || :"));
        assert_eq!((get("127.0.0.2").trim(), get("10.9.9.9").trim()), ("200", "000"));
    });
}

#[test]
fn a_connection_beyond_the_limit_is_refused_after_5_seconds() {
    both(|lab| {
        lab.stand_in("");
        let rfw = lab.start("local.server");
        lab.stand_in_for_changes("echo >> $lab/calls; /bin/sleep 30");
        let mut waiting: Vec<_> = (0..128).map(|_| Conn::open()).collect();
        for (n, conn) in waiting.iter_mut().enumerate() {
            conn.send(format!(
                "PUT /drop/input/any/10.0.0.{n} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            ));
        }
        await_true("iptables is run", SLACK, || !lab.read("calls").is_empty());
        rfw.await_queued();
        let begin = Instant::now();
        assert_eq!(ask("PUT /drop/input/any/10.0.1.1").brief(), "503 busy");
        let millis = begin.elapsed().as_millis();
        assert!((4_900..5_000 + u128::from(SLACK) * 1_000).contains(&millis), "{millis} ms");
        // No other connection was evicted for it.
        for conn in &mut waiting {
            assert_eq!(conn.answer().unwrap().status, 503);
        }
        assert!(lab.log().contains("WARNING 127.0.0.1 - \"-\" 503 busy: Too many connections."));
    });
}

/// The response is sent before the head is complete. Later bytes must not reset the connection: a
/// client that fails to send does not read the response.
#[test]
fn an_endless_head_over_tls_is_answered() {
    once(|lab| {
        tls::keys(lab);
        let _rfw = lab.start(tls::CONF);
        let ca = std::fs::read("/run/lab/keys/client/ca.crt").unwrap();
        let connector = Connector::new(Some(&ca), None).unwrap();
        let rest = [b'a'; 400_000];
        for (start, status) in [("", "414"), ("GET / HTTP/1.1\r\nX: ", "431")] {
            for _ in 0..10 {
                let stream = TcpStream::connect(OUTWARD).unwrap().into();
                let deadline = Rc::new(Cell::new(Instant::now() + Duration::from_secs(20)));
                let mut link = connector.link("127.0.0.1", DeadlineSocket { stream, deadline });
                let link = link.as_mut().unwrap();
                link.write_all(start.as_bytes()).unwrap();
                link.write_all(&rest[..8_000]).unwrap();
                thread::sleep(Duration::from_millis(10)); // so that it comes in two pieces
                link.write_all(&rest).unwrap();
                let mut answer = [0; 12];
                link.read_exact(&mut answer).unwrap();
                assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {status}"));
            }
        }
    });
}

#[test]
fn guesses_by_get_are_logged() {
    once(|lab| {
        let keys = "local.server.authentication\nauth.username = mu\nauth.password = secret";
        let _rfw = lab.start(&format!("local.server\n{keys}"));
        let wrong = "Authorization: Basic bXU6d3Jvbmc=\r\n";
        for _ in 0..12 {
            Conn::open().try_ask("GET /list", wrong).unwrap();
        }
        let lines = |result: &str| {
            let log = lab.read("rfw.log");
            let logged = format!("INFO 127.0.0.1 - \"GET /list\" {result} ");
            log.lines().filter(|line| line[25..].starts_with(&logged)).count()
        };
        await_true("ten and one wrong ones, then another", SLACK, || {
            lines("401 unauthorized") == 11 && lines("429 too_many_requests") == 1
        });
    });
}
