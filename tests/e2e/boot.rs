//! A start before the network: READY=1 for the supervisor, and an outward address that comes later.

use crate::lab::*;
use crate::tls;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

const PATH: &str = "/run/lab/notify";
const KEPT: &str = "local.server\nstate.file = state";

/// The supervisor's socket, and the `env` command that passes its name to rfw.
struct Supervisor {
    socket: UnixDatagram,
    env: [String; 2],
}

impl Supervisor {
    fn new(name: &str) -> Supervisor {
        let address = match name.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(name),
        };
        let socket = UnixDatagram::bind_addr(&address.unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10 + SLACK))).unwrap();
        Supervisor { socket, env: ["env".into(), format!("NOTIFY_SOCKET={name}")] }
    }

    fn launch<'l>(&self, lab: &'l Lab) -> Rfw<'l> {
        lab.launch(&self.env.each_ref().map(String::as_str))
    }

    /// The next datagram.
    fn receive(&self) -> String {
        let mut bytes = [0; 100];
        let length = self.socket.recv(&mut bytes).expect("a datagram in time");
        String::from_utf8_lossy(&bytes[..length]).into()
    }

    fn is_silent(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let error = self.socket.recv(&mut [0; 100]).map_err(|error| error.kind());
        self.socket.set_nonblocking(false).unwrap();
        error == Err(ErrorKind::WouldBlock)
    }
}

/// After a boot. iptables changes nothing before the file `go` exists.
#[test]
fn ready_comes_once_and_after_the_rules() {
    both(|lab| {
        tls::keys(lab);
        let conf = format!("{KEPT}\n{}", tls::CONF);
        lab.stand_in_for_changes(
            "echo >> $lab/calls; until [ -e $lab/go ]; do /bin/sleep 0.02; done",
        );
        for name in [PATH, "@rfw/test"] {
            lab.write("go", "");
            let mut rfw = lab.start(&conf);
            assert!(ask("PUT /drop/input/any/1.2.3.4").status == 200);
            rfw.kill();
            lab.reboot();
            sh("rm lab/go lab/calls");

            let supervisor = Supervisor::new(name);
            let _rfw = supervisor.launch(lab);
            await_true("rfw changes the kernel", 10 + SLACK, || !lab.read("calls").is_empty());
            assert!(supervisor.is_silent() && lab.rules().is_empty());
            lab.write("go", "");
            assert_eq!(supervisor.receive(), "READY=1", "{name}");
            assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
            assert!(!lab.guards().is_empty());
            assert_eq!(ask("GET /list").status, 200);
            assert!(curl("-k", "GET /", "https://127.0.0.1:7393").ends_with("401"));
            assert!(supervisor.is_silent(), "one datagram");
        }
    });
}

#[test]
fn a_start_that_fails_is_never_ready() {
    once(|lab| {
        let supervisor = Supervisor::new(PATH);
        let is_refused = |conf: &str| {
            lab.configure(conf);
            let ended = supervisor.launch(lab).await_end(10 + SLACK);
            assert!(ended == Some(1) && supervisor.is_silent(), "{ended:?}: {conf}");
        };
        let busy = std::net::TcpListener::bind(LOCAL).unwrap();
        is_refused(KEPT);
        drop(busy);
        is_refused("local.servr");
        lab.stand_in_for_changes("echo no >&2; exit 1");
        is_refused(KEPT);
        lab.write("state", "damaged\n");
        lab.stand_in("");
        is_refused(KEPT);
        sh("rm lab/state");
        // Neither do commands that do not start the server.
        for words in ["-t -f rfw.conf", "-V", "client get /list"] {
            sh(&format!(
                "cd lab; {}={PATH} {} {words} || true",
                "NOTIFY_SOCKET",
                env!("CARGO_BIN_EXE_rfw")
            ));
            assert!(supervisor.is_silent(), "{words}");
        }
        let _rfw = supervisor.launch(lab);
        assert_eq!(supervisor.receive(), "READY=1");
    });
}

/// A supervisor that does not exist, or that reads nothing, does not keep rfw from working.
#[test]
fn a_supervisor_that_does_not_listen_is_logged() {
    once(|lab| {
        lab.configure(KEPT);
        let deaf = Supervisor::new(PATH);
        let filler = UnixDatagram::unbound().unwrap();
        filler.set_nonblocking(true).unwrap();
        while filler.send_to(b"x", PATH).is_ok() {}
        for name in [PATH, "/run/lab/nobody", "@nobody", "", "nobody"] {
            let _rfw = lab.launch(&["env", &format!("NOTIFY_SOCKET={name}")]);
            let line = format!(" WARNING cannot send READY=1 to NOTIFY_SOCKET={name}: ");
            await_true(name, 15 + SLACK, || lab.read("rfw.log").contains(&line));
            assert_eq!(ask("PUT /drop/input/any/1.2.3.4?expire=1").status, 200, "{name}");
            await_true("it expires", 5 + SLACK, || lab.rules().is_empty());
            lab.clear_log();
        }
        assert_eq!(deaf.receive(), "x");
    });
}

/// `v` gets its addresses later; an IPv6 address is tentative for a second.
#[test]
fn the_outward_address_comes_later() {
    once(|lab| {
        sh("ip link add v type veth peer name w; ip link set v up; ip link set w up");
        lab.write("white.list", "10.77.0.1\nfd77::1\n");
        tls::keys(lab);
        for (ip, url) in
            [("10.77.0.1", "https://10.77.0.1:7393"), ("fd77::1", "https://[fd77::1]:7393")]
        {
            let outward = tls::CONF.replace("ip = ::", &format!("ip = {ip}"));
            lab.configure(&format!("local.server\n{outward}"));
            let supervisor = Supervisor::new(&format!("@{ip}"));
            let mut rfw = supervisor.launch(lab);
            assert_eq!(supervisor.receive(), "READY=1");
            assert_eq!(ask("PUT /drop/input/any/1.2.3.4?expire=1").brief(), "200 inserted");
            let guards = lab.guards();
            assert!(guards.len() > 1);
            lab.iptables("-F");
            await_true("the guards are back", 10 + SLACK, || lab.guards() == guards);
            await_true("it expires", 5 + SLACK, || lab.rules().is_empty());
            assert!(curl("-k", "GET /", url).contains("curl: (7)"));

            sh(&format!("ip addr add {ip} dev v"));
            await_true(url, 5 + SLACK, || curl("-k", "GET /", url).ends_with("401"));
            let log = lab.log();
            let warning = format!(" WARNING cannot listen at {url}: ");
            assert_eq!(log.matches(&warning).count(), 1, "{log}");
            assert!(log.contains(&format!(" INFO {url} is open\n")), "{log}");
            rfw.await_idle();
            lab.clear_log();
            rfw.kill();
        }
    });
}

/// rfw decided at its start whether the host has ::1, also before the host had 127.0.0.1.
#[test]
fn the_loopback_interface_comes_later() {
    once(|lab| {
        sh("ip link set lo down; ip addr flush dev lo");
        lab.configure("local.server");
        let supervisor = Supervisor::new("@lo");
        let _rfw = supervisor.launch(lab);
        assert_eq!(supervisor.receive(), "READY=1");
        sh("ip link set lo up");
        for url in ["http://127.0.0.1:7390", "http://[::1]:7390"] {
            await_true(url, 5 + SLACK, || curl("", "GET /", url).ends_with("200"));
        }
    });
}

#[test]
fn a_port_in_use_is_an_error_on_an_address_that_exists() {
    once(|lab| {
        tls::keys(lab);
        let _busy = std::net::TcpListener::bind("[::]:7393").unwrap();
        lab.configure(tls::CONF);
        let (status, said) = lab.rfw("-f rfw.conf --logfile -");
        assert!(status == 1 && said.contains("cannot listen on :: port 7393"), "{status} {said}");
    });
}
