//! The listeners, and the whole life of a request.

use crate::api::{self, Command, Grammar};
use crate::config::Config;
use crate::firewall::{Firewall, Outcome};
use crate::http::auth::{self, Client, Credentials};
use crate::http::request::{Body, Request};
use crate::http::response::{Chunked, Refusal, Response};
use crate::http::stream::{NoHead, Stream};
use crate::http::tls::Acceptor;
use crate::log::{Level, Log, printable};
use crate::rule::Chain;
use crate::rule::whitelist::Whitelist;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long a whole head may take, TLS handshake included; a connection that
/// is kept may be silent for as long.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// How long a client may take to receive an answer, and a list.
const ANSWER_TIME: Duration = Duration::from_secs(10);
const LIST_TIME: Duration = Duration::from_secs(30);
/// Connections that one listener serves at a time, a thread each.
const MAX_CONNECTIONS: usize = 128;
/// What a thread may use as stack; a TLS handshake takes some 30 KiB.
const STACK: usize = 256 * 1024;

/// What all listeners share.
pub struct Server {
    /// The command function.
    pub firewall: Firewall,
    /// Whom to let in, and what not to touch.
    pub whitelist: Arc<Whitelist>,
    /// The log.
    pub log: Arc<Log>,
    /// The grammar that rfw.conf sets.
    pub grammar: Grammar,
    /// The one user.
    pub credentials: Option<Credentials>,
    /// Where the servers listen, for the help text.
    pub addresses: String,
}

/// What makes the outward and the local server different.
pub struct Door {
    listener: TcpListener,
    /// The outward server speaks TLS, and to whitelisted peers only.
    tls: Option<Acceptor>,
    /// Whether credentials are asked for.
    authentication: bool,
    connections: AtomicUsize,
}

impl Door {
    /// Binds what rfw.conf names. The error is a sentence.
    pub fn open(config: &Config, acceptor: Option<Acceptor>) -> Result<Vec<Door>, String> {
        let mut doors = Vec::new();
        if let (Some(outward), Some(acceptor)) = (&config.outward, acceptor) {
            let listener = bind(outward.ip, outward.port, "outward.server")?;
            doors.push(Door::new(listener, Some(acceptor), true));
        }
        if let Some(local) = &config.local {
            let v4 = bind(Ipv4Addr::LOCALHOST.into(), local.port, "local.server")?;
            doors.push(Door::new(v4, None, local.authentication));
            // Where the host has no ::1, there is no such address to bind.
            if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
                let v6 = bind(Ipv6Addr::LOCALHOST.into(), local.port, "local.server")?;
                doors.push(Door::new(v6, None, local.authentication));
            }
        }
        Ok(doors)
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        self.listener.local_addr().map_or_else(|e| e.to_string(), |at| format!("{scheme}://{at}"))
    }

    /// The local server is for who means this host by its name: a web page in
    /// a browser here, whose name was made to point here, means another one.
    fn check_host(&self, request: &Request) -> Result<(), Refusal> {
        let host = request.host.as_deref().unwrap_or_default();
        let port = self.listener.local_addr().map_or(0, |address| address.port());
        let name = host.strip_suffix(&format!(":{port}")).unwrap_or(host);
        let names = ["localhost", "127.0.0.1", "[::1]"];
        match self.tls.is_some() || names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            true => Ok(()),
            false => Err(Refusal::BadRequest("The Host must be localhost, 127.0.0.1 or [::1].")),
        }
    }

    fn new(listener: TcpListener, tls: Option<Acceptor>, authentication: bool) -> Door {
        Door { listener, tls, authentication, connections: AtomicUsize::new(0) }
    }
}

fn bind(ip: IpAddr, port: u16, key: &str) -> Result<TcpListener, String> {
    TcpListener::bind((ip, port)).map_err(|error| {
        format!("cannot listen on {ip} port {port}: {error}; change {key}.port or {key}.ip, or stop who uses it")
    })
}

impl Server {
    /// Accepts for ever, a thread for each connection.
    pub fn listen(self: &Arc<Server>, door: Door) {
        let door = Arc::new(door);
        loop {
            match door.listener.accept() {
                Ok((socket, peer)) => self.accept(&door, socket, peer.ip().to_canonical()),
                Err(error) => {
                    self.log.warning(format_args!("cannot accept a connection: {error}"));
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn accept(self: &Arc<Server>, door: &Arc<Door>, socket: TcpStream, peer: IpAddr) {
        if door.tls.is_some() && !self.whitelist.admits(peer) {
            self.log.write(Level::Debug, format_args!("{peer} is not whitelisted"));
            return;
        }
        let Ok(stream) = Stream::new(socket, door.tls.as_ref()) else {
            return;
        };
        if door.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            door.connections.fetch_sub(1, Ordering::Relaxed);
            stream.turn_away();
            return;
        }
        let (server, own) = (self.clone(), door.clone());
        let serve = move || {
            serve(&server, &own, stream, peer);
            own.connections.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().stack_size(STACK).spawn(serve) {
            door.connections.fetch_sub(1, Ordering::Relaxed);
            self.log.warning(format_args!("cannot serve {peer}: {error}"));
        }
    }
}

/// Serves one connection: head, request, answer, and again.
fn serve(server: &Server, door: &Door, mut stream: Stream, peer: IpAddr) {
    loop {
        stream.give(HEAD_TIME);
        let request = match stream.head() {
            Ok(head) => Request::parse(&head),
            Err(NoHead::Refused(refusal)) => Err(refusal),
            Err(NoHead::Gone) => return stream.close(),
        };
        let started = Instant::now();
        let (keep, answer) = match &request {
            Err(refusal) => (false, Err(refusal.clone())),
            // A body that nobody reads would be taken for the next request.
            Ok(request) => (
                request.keep_alive && request.body == Body::Length(0),
                carry_out(server, door, peer, request),
            ),
        };
        stream.give(ANSWER_TIME);
        let sent = send(server, &answer, request.as_ref().ok(), keep, &mut stream);
        record(server, peer, &answer, request.as_ref().ok(), started.elapsed());
        if sent.is_err() || !keep {
            return stream.close();
        }
    }
}

/// What a request comes to.
enum Answer {
    Help,
    /// To be read from the kernel while it is sent.
    List(Client, Option<Chain>),
    Change(Client, Outcome),
}

/// From the request to the kernel; nothing comes back.
fn carry_out(
    server: &Server,
    door: &Door,
    peer: IpAddr,
    request: &Request,
) -> Result<Answer, Refusal> {
    door.check_host(request)?;
    let credentials = server.credentials.as_ref().filter(|_| door.authentication);
    let client = auth::admit(peer, request.authorization.as_deref(), credentials)?;
    if request.body != Body::Length(0) {
        return Err(Refusal::Body);
    }
    match Command::parse(request, server.grammar)? {
        Command::Help => Ok(Answer::Help),
        Command::List(chain) => Ok(Answer::List(client, chain)),
        Command::Change(change) => {
            let change = server.whitelist.permit(change).map_err(Refusal::Whitelisted)?;
            let outcome = server.firewall.apply(&client, change)?;
            Ok(Answer::Change(client, outcome))
        }
    }
}

fn send(
    server: &Server,
    answer: &Result<Answer, Refusal>,
    request: Option<&Request>,
    keep: bool,
    stream: &mut Stream,
) -> io::Result<()> {
    let response = match answer {
        Ok(Answer::Help) => Response::text(api::help(&server.addresses, server.grammar)),
        Ok(Answer::Change(_, outcome)) => Response::json(api::outcome_json(outcome)),
        Ok(Answer::List(client, chain)) => {
            stream.give(LIST_TIME);
            let http11 = request.is_some_and(|request| request.http11);
            return send_list(server, client, *chain, Chunked::new(stream, http11, keep));
        }
        Err(refusal) => Response::refusal(refusal),
    };
    let head_only = request.is_some_and(|request| request.method == "HEAD");
    stream.send(response.bytes(keep, head_only).as_bytes())
}

/// Sends the list while it is read. Once a part of it is out, an error can only
/// be told by ending the connection before the list's end.
fn send_list(
    server: &Server,
    client: &Client,
    chain: Option<Chain>,
    mut body: Chunked<'_>,
) -> io::Result<()> {
    let mut sent = body.push("[");
    let mut comma = "";
    let listed = server.firewall.list(client, chain, |listed| {
        sent = body.push(comma).and_then(|()| body.push(&api::listed_json(listed)));
        comma = ",\n";
        sent.is_ok()
    });
    sent?;
    match listed {
        Ok(()) => body.push("]\n").and_then(|()| body.end()),
        Err(refusal) => body.refuse(&refusal),
    }
}

/// One line for every change, made or refused; other requests at DEBUG.
fn record(
    server: &Server,
    peer: IpAddr,
    answer: &Result<Answer, Refusal>,
    request: Option<&Request>,
    duration: Duration,
) {
    let change = request.is_some_and(|request| request.method != "GET" || api::modifies(request));
    let level = if change { Level::Info } else { Level::Debug };
    let (who, result) = match answer {
        Ok(Answer::Change(client, outcome)) => (client.to_string(), outcome.verdict.name().into()),
        Ok(Answer::List(client, _)) => (client.to_string(), "listed".into()),
        Ok(Answer::Help) => (format!("{peer} -"), "helped".into()),
        Err(refusal) => (format!("{peer} -"), refusal.to_string()),
    };
    let line = request.map_or_else(|| "-".into(), Request::line);
    let line = printable(line.as_bytes());
    server.log.write(
        level,
        format_args!("{who} \"{line}\" {result} {:.1} ms", duration.as_secs_f64() * 1e3),
    );
}
