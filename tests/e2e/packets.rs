//! Packets between namespaces: stopped if blocked, and only then.
//!
//! ```text
//!   this test, the attacker        r, a router with rfw               b, a server behind it
//!   10.0.1.2  fd00:1::2  va ------ eth1  10.0.1.1  fd00:1::1
//!                                  eth2  10.0.2.1  fd00:2::1  ------- vb  10.0.2.2  fd00:2::2
//! ```

use crate::lab::*;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;
use std::{env, thread};

const TOPOLOGY: &str = "
    ip netns add r; ip netns add b
    ip link add va type veth peer eth1 netns r
    ip -n r link add eth2 type veth peer vb netns b
    up() { ip -n $1 addr add $3/24 dev $2; ip -n $1 addr add $4/64 dev $2 nodad; ip -n $1 link set $2 up; }
    ip addr add 10.0.1.2/24 dev va; ip addr add fd00:1::2/64 dev va nodad; ip link set va up
    up r eth1 10.0.1.1 fd00:1::1; up r eth2 10.0.2.1 fd00:2::1; up b vb 10.0.2.2 fd00:2::2
    ip -n r link set lo up; ip -n b link set lo up
    ip route add 10.0.2.0/24 via 10.0.1.1; ip route add fd00:2::/64 via fd00:1::1
    ip -n b route add default via 10.0.2.1; ip -n b route add default via fd00:2::1
    nsenter --net=/run/netns/r sh -c '
        echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding'";

/// Not a test: the far end, which `Echo` starts in another namespace.
#[test]
#[ignore = "not a test: the other tests of this module start it"]
fn echo() {
    if env::var_os("RFW_E2E_ECHO").is_none() {
        return;
    }
    for stream in TcpListener::bind("[::]:7").unwrap().incoming().flatten() {
        let mut writer = stream.try_clone().unwrap();
        thread::spawn(move || std::io::copy(&mut { stream }, &mut writer));
    }
}

fn start_echo(namespace: &str) -> Process {
    let exe = env::current_exe().unwrap();
    let echo = format!("{} --ignored --exact packets::echo", exe.display());
    Process::start(&format!("nsenter --net=/run/netns/{namespace} env RFW_E2E_ECHO=1 {echo}"))
}

/// A TCP connection that sends a byte and receives its echo.
struct Talk(TcpStream);

impl Talk {
    fn open(host: &str, wait: Duration) -> Result<Talk, String> {
        let address: SocketAddr = format!("{host}:7").parse().unwrap();
        let stream = TcpStream::connect_timeout(&address, wait);
        stream.map(Talk).map_err(|error| error.kind().to_string())
    }

    fn says(&mut self, word: u8, wait: Duration) -> bool {
        self.0.write_all(&[word]).is_ok() && self.hears(word, wait)
    }

    fn hears(&mut self, word: u8, wait: Duration) -> bool {
        let mut heard = [0];
        self.0.set_read_timeout(Some(wait)).unwrap();
        self.0.read_exact(&mut heard).is_ok() && heard[0] == word
    }
}

/// How long to wait for packets that should pass, and for packets that should not.
const LONG: Duration = Duration::from_secs(SLACK);
const SHORT: Duration = Duration::from_millis(300);

/// "passes", or what the attacker sees instead.
fn new_connection(host: &str, expected: &str) -> String {
    let wait = if expected == "timed out" { SHORT } else { LONG };
    match Talk::open(host, wait) {
        Ok(mut talk) => ["silent", "passes"][usize::from(talk.says(b'?', wait))].into(),
        Err(error) => error,
    }
}

/// rfw's response in short form, to a request from the router's namespace.
fn router(request: &str) -> String {
    let words = format!(
        "--net=/run/netns/r curl -sS -g -m 20 -X {}",
        request.replacen(' ', " http://localhost:7390", 1)
    );
    let out = Command::new("nsenter").args(words.split(' ')).output().expect("curl is needed");
    let answer = Answer { status: 0, head: String::new(), body: text(&out) };
    [answer.field("result"), answer.field("error")].concat()
}

/// A rule; the fate of a new connection to the router, and to the server behind it.
const RULES: [(&str, &str, &str); 15] = [
    ("/drop/input/any/ATTACKER", "timed out", "passes"),
    ("/drop/input/any/ATTACKER/BLOCK", "timed out", "passes"),
    ("/drop/input/eth1/ATTACKER", "timed out", "passes"),
    ("/drop/input/eth/ATTACKER", "timed out", "passes"),
    ("/drop/input/eth2/ATTACKER", "passes", "passes"),
    ("/reject/input/any/ATTACKER", "connection refused", "passes"),
    ("/accept/input/any/ATTACKER", "passes", "passes"),
    ("/drop/output/any/ATTACKER", "timed out", "passes"),
    ("/drop/output/eth2/ATTACKER", "passes", "passes"),
    ("/drop/forward/any/ATTACKER", "passes", "timed out"),
    ("/drop/forward/eth1/ATTACKER/eth2/SERVER", "passes", "timed out"),
    ("/drop/forward/eth2/ATTACKER/eth1/SERVER", "passes", "passes"),
    ("/drop/forward/any/ANY/any/SERVER", "passes", "timed out"),
    ("/drop/forward/any/SERVER", "passes", "timed out"),
    ("/reject/forward/any/ATTACKER/eth2", "passes", "connection refused"),
];

/// Attacker, server, any; the router and the server as a client writes them.
const FAMILIES: [[&str; 5]; 2] = [
    ["10.0.1.2", "10.0.2.2", "0.0.0.0", "10.0.1.1", "10.0.2.2"],
    ["fd00:1::2", "fd00:2::2", "::", "[fd00:1::1]", "[fd00:2::2]"],
];

#[test]
fn input_output_forward() {
    both(|lab| {
        let _running = start(lab);
        for [attacker, server, any, to_router, to_server] in FAMILIES {
            for (rule, router_is, server_is) in RULES {
                // Two addresses, neither of which is the router's own.
                let block = if any == "::" { "127" } else { "31" };
                let rule = rule
                    .replace("BLOCK", block)
                    .replace("ATTACKER", attacker)
                    .replace("SERVER", server)
                    .replace("ANY", any);
                for (host, expected) in [(to_router, router_is), (to_server, server_is)] {
                    // A connection that existed before the rule, and a new one.
                    let mut talk = Talk::open(host, LONG).unwrap();
                    assert!(talk.says(b'1', LONG), "{rule}");
                    assert_eq!(router(&format!("PUT {rule}")), "inserted", "{rule}");
                    assert_eq!(new_connection(host, expected), expected, "{rule} {host}");
                    let (passes, wait) =
                        if expected == "passes" { (true, LONG) } else { (false, SHORT) };
                    assert_eq!(talk.says(b'2', wait), passes, "{rule} {host}");
                    assert_eq!(router(&format!("DELETE {rule}")), "deleted", "{rule}");
                }
            }
        }
    });
}

#[test]
fn an_established_connection_goes_on_after_the_block() {
    both(|lab| {
        let _running = start(lab);
        for [attacker, _, _, to_router, to_server] in FAMILIES {
            for (chain, host) in
                [("input", to_router), ("output", to_router), ("forward", to_server)]
            {
                let mut talk = Talk::open(host, LONG).unwrap();
                assert!(talk.says(b'1', LONG), "{chain}");
                assert_eq!(
                    router(&format!("PUT /drop/{chain}/any/{attacker}?expire=2")),
                    "inserted"
                );
                assert!(!talk.says(b'2', SHORT), "{chain} {host}");
                await_true("TCP sends it again after the expiry", 12, || talk.hears(b'2', LONG));
            }
        }
    });
}

#[test]
fn the_newer_of_two_overlapping_rules_wins() {
    both(|lab| {
        let _running = start(lab);
        let rows = [
            ("PUT /drop/input/any/10.0.1.2/31", "timed out"),
            ("PUT /accept/input/any/10.0.1.2", "passes"),
            ("PUT /drop/input/eth1/10.0.1.2", "timed out"),
            ("PUT /accept/input/any/10.0.1.2", "passes"),
            ("DELETE /accept/input/any/10.0.1.2", "timed out"),
            ("DELETE /drop/input/eth1/10.0.1.2", "timed out"),
            ("DELETE /drop/input/any/10.0.1.2/31", "passes"),
        ];
        for (request, expected) in rows {
            router(request);
            assert_eq!(new_connection("10.0.1.1", expected), expected, "{request}");
        }
    });
}

/// The topology, rfw in the router, and the echo servers; dropping it ends them all.
fn start(lab: &Lab) -> (Rfw<'_>, [Process; 2]) {
    sh(TOPOLOGY);
    lab.configure("local.server");
    let running = (lab.launch(&["nsenter", "--net=/run/netns/r"]), ["r", "b"].map(start_echo));
    await_true("rfw answers", 10 + SLACK, || router("GET /nothing") == "not_found");
    for host in ["10.0.1.1", "10.0.2.2", "[fd00:1::1]", "[fd00:2::2]"] {
        await_true("the far end answers", 10 + SLACK, || {
            new_connection(host, "passes") == "passes"
        });
    }
    running
}
