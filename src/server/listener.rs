//! The listeners: bind, accept, admission.

use super::Server;
use super::connection::Connection;
use super::limiter::{Client, ConnectionLimiter, Limits, MAX_WAIT};
use crate::clock;
use crate::config::{Config, Local};
use crate::http::api_error::ApiError;
use crate::http::response::ResponseWriter;
use crate::http::stream::HttpStream;
use crate::http::tls::Acceptor;
use crate::log::{Level, Log};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

/// How many connections one listener serves at a time, each in its own thread. A client needs some
/// milliseconds from connecting to its request; there is room for 4,000 connections per second.
const CONNECTIONS: Limits = Limits {
    slots: 128,
    evicting: 64,
    patience: Duration::from_millis(20),
    poll: Duration::from_millis(1),
};
/// How many accepted connections wait for a slot. If a burst overflowed the kernel's queue (128, by
/// std), the clients would retry only after a second. All connections together need fewer than
/// 1,024 descriptors, with some left for the programs.
const MAX_ARRIVALS: usize = 128;
/// The stack size of a thread; a TLS handshake uses some 30 KiB.
const STACK: usize = 256 * 1024;
/// The time limit for reading a request that is refused for lack of a slot.
const READ_TIME: Duration = Duration::from_millis(1);
/// The pause between attempts to bind an address that this host does not have yet.
const RETRY: Duration = Duration::from_secs(1);
/// How long a port may still be in use at the start: when rfw is killed, the kernel may release its lock
/// before its sockets.
const CLOSE_TIME: Duration = Duration::from_secs(2);
/// `0` if the loopback interface has ::1 when it is up.
const DISABLE_IPV6: &str = "/proc/sys/net/ipv6/conf/lo/disable_ipv6";

/// Where accepted connections wait for a slot, each with its deadline.
type Arrivals = SyncSender<(Arc<Client>, Instant)>;

/// A socket, and the differences between the outward and the local server.
pub struct Listener {
    address: SocketAddr,
    /// `None` while this host does not have the address.
    socket: Option<TcpListener>,
    /// The outward server speaks TLS, and to whitelisted peers only.
    pub tls: Option<Acceptor>,
    pub authentication: bool,
    pub limiter: Arc<ConnectionLimiter>,
}

impl Listener {
    /// Binds the addresses of rfw.conf; one that this host does not have yet is bound later. The
    /// error is a sentence.
    pub fn open(config: &Config, acceptor: Option<Acceptor>) -> Result<Vec<Listener>, String> {
        let mut listeners = Vec::new();
        if let (Some(outward), Some(acceptor)) = (&config.outward, acceptor) {
            let address = SocketAddr::new(outward.ip, outward.port);
            listeners.push(Listener::bind(address, Some(acceptor), true)?);
        }
        if let Some(Local { port, authentication }) = config.local {
            let [v4, v6] = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
            listeners.push(Listener::bind(SocketAddr::new(v4, port), None, authentication)?);
            // Without IPv6, the host has no ::1; before the network, it has none yet.
            let is_later = |error: io::Error| {
                let is_missing = error.kind() == ErrorKind::AddrNotAvailable;
                is_missing && fs::read(DISABLE_IPV6).is_ok_and(|text| text == b"0\n")
            };
            if TcpListener::bind((v6, 0)).map_or_else(is_later, |_| true) {
                listeners.push(Listener::bind(SocketAddr::new(v6, port), None, authentication)?);
            }
        }
        Ok(listeners)
    }

    fn bind(
        address: SocketAddr,
        tls: Option<Acceptor>,
        authentication: bool,
    ) -> Result<Listener, String> {
        let until = clock::after(CLOSE_TIME);
        let socket = loop {
            match TcpListener::bind(address) {
                Ok(socket) => break Some(socket),
                Err(error) if error.kind() == ErrorKind::AddrNotAvailable => break None,
                Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err(error) => {
                    let key = if tls.is_some() { "outward.server" } else { "local.server" };
                    let (ip, port) = (address.ip(), address.port());
                    return Err(format!(
                        "cannot listen on {ip} port {port} ({key}): {error}; choose another port, \
                         or stop the program that uses this one; below 1024, rfw needs \
                         CAP_NET_BIND_SERVICE"
                    ));
                }
            }
        };
        let limiter = ConnectionLimiter::new(CONNECTIONS);
        Ok(Listener { address, socket, tls, authentication, limiter })
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Starts the threads that accept and dispatch connections until rfw ends.
    pub fn start(mut self, server: Arc<Server>) -> io::Result<()> {
        let socket = self.socket.take();
        let listener = Arc::new(self);
        let (arrive, arrivals) = mpsc::sync_channel(MAX_ARRIVALS);
        let (dispatcher, shared) = (listener.clone(), server.clone());
        thread::Builder::new().spawn(move || {
            for (client, deadline) in arrivals {
                dispatcher.dispatch(&shared, client, deadline);
            }
        })?;
        thread::Builder::new().spawn(move || listener.listen(socket, &server, &arrive)).map(drop)
    }

    /// Accepts connections, and passes on those that are permitted.
    fn listen(&self, socket: Option<TcpListener>, server: &Server, arrive: &Arrivals) {
        let socket = socket.unwrap_or_else(|| self.await_address(&server.log));
        loop {
            match socket.accept() {
                Ok((socket, address)) => {
                    let peer = address.ip().to_canonical();
                    // With net.ipv4.conf.*.route_localnet, 127.0.0.1 has neighbours (CVE-2020-8558).
                    let is_admitted = match &self.tls {
                        Some(_) => server.whitelist.admits(peer),
                        None => peer.is_loopback(),
                    };
                    if is_admitted {
                        let deadline = clock::after(MAX_WAIT);
                        let _ = arrive.send((Client::new(peer, socket), deadline));
                    } else {
                        server.log.write(Level::Debug, format_args!("{peer} may not connect"));
                    }
                }
                Err(error) => {
                    server.log.warning(format_args!("cannot accept a connection: {error}"));
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Binds the address as soon as this host has it: rfw starts before the network.
    fn await_address(&self, log: &Log) -> TcpListener {
        let url = self.url();
        log.warning(format_args!(
            "cannot listen at {url}: this host does not have the address; rfw tries again every \
             second, until it has and the port is free"
        ));
        loop {
            thread::sleep(RETRY);
            if let Ok(socket) = TcpListener::bind(self.address) {
                log.info(format_args!("{url} is open"));
                return socket;
            }
        }
    }

    /// Waits for a slot until the deadline, then serves the connection in a new thread.
    fn dispatch(self: &Arc<Self>, server: &Arc<Server>, client: Arc<Client>, deadline: Instant) {
        let peer = client.ip;
        if has_left(&client.socket).unwrap_or(true) {
            return;
        }
        let Some(slot) = self.limiter.acquire(&client, deadline) else {
            let event = format_args!("{peer} - \"-\" 503 busy: Too many connections.");
            server.log.refusal(peer, Level::Warning, event);
            return self.refuse(client.socket.clone());
        };
        let (listener, shared) = (self.clone(), server.clone());
        let serve = move || {
            shared.metrics.connections.add(1);
            shared.metrics.open_connections.add(1);
            if let Ok(stream) = HttpStream::new(client.socket.clone(), listener.tls.as_ref()) {
                let connection = Connection { server: &shared, listener: &listener, client };
                connection.serve(stream);
            }
            drop(slot);
            shared.metrics.open_connections.decrement();
        };
        if let Err(error) = thread::Builder::new().stack_size(STACK).spawn(serve) {
            let event = format_args!("cannot serve {peer}: {error}");
            server.log.refusal(peer, Level::Warning, event);
        }
    }

    /// Refuses a connection that got no slot: with a response, or by closing it if it is TLS.
    fn refuse(&self, socket: Arc<TcpStream>) {
        if let (None, Ok(mut stream)) = (&self.tls, HttpStream::new(socket, None)) {
            // If unread data is left, the kernel resets the connection and the response is lost.
            stream.set_deadline(READ_TIME);
            let _ = stream.request();
            let busy = ApiError::Busy("Too many connections.".into());
            ResponseWriter::new(&mut stream, None).refuse(&busy);
        }
    }
}

/// Whether the client has disconnected without a byte: it needs neither a slot nor a thread.
fn has_left(socket: &TcpStream) -> io::Result<bool> {
    socket.set_nonblocking(true)?;
    let next = socket.peek(&mut [0]);
    socket.set_nonblocking(false)?;
    Ok(match next {
        Ok(count) => count == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_client_that_has_left() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for (bytes, leaves, expected) in
            [("", false, false), ("G", false, false), ("G", true, false), ("", true, true)]
        {
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (socket, _) = listener.accept().unwrap();
            client.write_all(bytes.as_bytes()).unwrap();
            let client = Some(client).filter(|_| !leaves);
            if leaves || !bytes.is_empty() {
                socket.peek(&mut [0]).unwrap(); // waits until the kernel knows
            }
            assert_eq!(has_left(&socket).unwrap(), expected, "{bytes:?} {leaves}");
            drop(client);
        }
    }
}
