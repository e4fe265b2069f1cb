//! The listeners: bind, accept, admission.

use super::Server;
use super::connection::Connection;
use super::limiter::{ConnectionLimiter, Limits, MAX_WAIT};
use crate::clock;
use crate::config::{Config, Local};
use crate::http::api_error::ApiError;
use crate::http::request::Request;
use crate::http::response::ResponseWriter;
use crate::http::stream::HttpStream;
use crate::http::tls::Acceptor;
use crate::log::{Level, Log};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Connections that one listener serves at a time, a thread each. From its connect to its request
/// a client needs some milliseconds; and 4,000 connections a second still find room.
const CONNECTIONS: Limits = Limits {
    slots: 128,
    evicting: 64,
    patience: Duration::from_millis(20),
    poll: Duration::from_millis(1),
};
/// Connections that are accepted and wait for a slot: a burst waits here, because the kernel's
/// queue (128, by std) drops what it has no room for, and a client tries again only after a
/// second. All together stay under 1,024 descriptors, with some left for the programs.
const MAX_ARRIVALS: usize = 128;
/// What a thread may use as stack; a TLS handshake takes some 30 KiB.
const STACK: usize = 256 * 1024;
/// How long it may take to read a request that has been waiting, before it is refused.
const READ_TIME: Duration = Duration::from_millis(1);
/// How long to wait for an address that this host does not have, before the next try.
const RETRY: Duration = Duration::from_secs(1);

/// A socket and what makes the outward and the local server different.
pub struct Listener {
    address: SocketAddr,
    /// `None` while this host does not have the address.
    socket: Option<TcpListener>,
    /// The outward server speaks TLS, and to whitelisted peers only.
    tls: Option<Acceptor>,
    /// Whether credentials are asked for.
    pub authentication: bool,
    limiter: Arc<ConnectionLimiter>,
}

/// Who has connected, and until when it waits for a slot.
struct Arrival {
    socket: Arc<TcpStream>,
    peer: IpAddr,
    deadline: Instant,
}

impl Listener {
    /// Binds what rfw.conf names and this host has. The error is a sentence.
    pub fn open(config: &Config, acceptor: Option<Acceptor>) -> Result<Vec<Listener>, String> {
        let mut listeners = Vec::new();
        if let (Some(outward), Some(acceptor)) = (&config.outward, acceptor) {
            let address = SocketAddr::new(outward.ip, outward.port);
            listeners.push(Listener::bind(address, Some(acceptor), true)?);
        }
        if let Some(Local { port, authentication }) = config.local {
            let [v4, v6] = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
            listeners.push(Listener::bind(SocketAddr::new(v4, port), None, authentication)?);
            // Where the host has no ::1, there is no such address to bind.
            if TcpListener::bind((v6, 0)).is_ok() {
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
        let socket = match TcpListener::bind(address) {
            Ok(socket) => Some(socket),
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => None,
            Err(error) => {
                let key = if tls.is_some() { "outward.server" } else { "local.server" };
                let (ip, port) = (address.ip(), address.port());
                return Err(format!(
                    "cannot listen on {ip} port {port} ({key}): {error}; choose another port, or \
                     stop the program that uses this one"
                ));
            }
        };
        let limiter = ConnectionLimiter::new(CONNECTIONS);
        Ok(Listener { address, socket, tls, authentication, limiter })
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The local server is for whoever means this host by its name: a web page in a browser here,
    /// whose name was made to point here, means another one.
    pub fn check_host(&self, request: &Request) -> Result<(), ApiError> {
        match self.tls.is_some() || request.is_for_localhost() {
            true => Ok(()),
            false => Err(ApiError::Http(400, "The Host must be localhost, 127.0.0.1 or [::1].")),
        }
    }

    /// Accepts for ever, and hands on whoever may come in.
    pub fn listen(mut self, server: Arc<Server>) {
        let socket = self.socket.take().unwrap_or_else(|| self.await_address(&server.log));
        let listener = Arc::new(self);
        let (arrive, arrivals) = mpsc::sync_channel(MAX_ARRIVALS);
        let (dispatcher, shared) = (listener.clone(), server.clone());
        thread::spawn(move || {
            arrivals.into_iter().for_each(|arrival| dispatcher.dispatch(&shared, arrival));
        });
        loop {
            match socket.accept() {
                Ok((socket, address)) => {
                    let peer = address.ip().to_canonical();
                    if listener.tls.is_none() || server.whitelist.admits(peer) {
                        let deadline = clock::after(MAX_WAIT);
                        let _ = arrive.send(Arrival { socket: socket.into(), peer, deadline });
                    } else {
                        server.log.write(Level::Debug, format_args!("{peer} is not whitelisted"));
                    }
                }
                Err(error) => {
                    server.log.warning(format_args!("cannot accept a connection: {error}"));
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Binds as soon as this host has the address: rfw starts before the network.
    fn await_address(&self, log: &Log) -> TcpListener {
        let mut last_error = None;
        loop {
            match TcpListener::bind(self.address) {
                Ok(socket) => {
                    log.info(format_args!("{} is open", self.url()));
                    return socket;
                }
                Err(error) if last_error == Some(error.kind()) => {}
                Err(error) => {
                    log.warning(format_args!(
                        "cannot listen at {}: {error}; rfw tries again every second, until this \
                         host has the address and the port is free",
                        self.url()
                    ));
                    last_error = Some(error.kind());
                }
            }
            thread::sleep(RETRY);
        }
    }

    /// Waits for a slot for a connection, and has a thread serve it.
    fn dispatch(self: &Arc<Listener>, server: &Arc<Server>, arrival: Arrival) {
        let Arrival { socket, peer, deadline } = arrival;
        let Some(slot) = self.limiter.acquire(&socket, peer, deadline, || false) else {
            return self.refuse(socket);
        };
        let (listener, shared) = (self.clone(), server.clone());
        let serve = move || {
            shared.metrics.connections.add(1);
            shared.metrics.open_connections.add(1);
            if let Ok(stream) = HttpStream::new(socket, listener.tls.as_ref()) {
                let connection = Connection { server: &shared, listener: &listener, peer, slot };
                connection.serve(stream);
            }
            shared.metrics.open_connections.decrement();
        };
        if let Err(error) = thread::Builder::new().stack_size(STACK).spawn(serve) {
            server.log.warning(format_args!("cannot serve {peer}: {error}"));
        }
    }

    /// Refuses a connection that got no slot; one that speaks TLS is just closed.
    fn refuse(&self, socket: Arc<TcpStream>) {
        if let (None, Ok(mut stream)) = (&self.tls, HttpStream::new(socket, None)) {
            // What is left unread makes the kernel reset the connection, and the refusal is lost.
            stream.set_deadline(READ_TIME);
            let _ = stream.request();
            let busy = ApiError::Busy("Too many connections.".into());
            ResponseWriter::new(&mut stream, None).refuse(&busy);
        }
    }
}
