//! The listeners, and the whole life of a request.

use crate::api::{self, Command, Grammar};
use crate::config::{Config, Local};
use crate::firewall::Firewall;
use crate::firewall::iptables::TaggedRule;
use crate::firewall::list::{Outcome, Verdict};
use crate::host;
use crate::http::auth::{self, Client, Credentials, Guesses};
use crate::http::refusal::Refusal;
use crate::http::request::{Body, Request};
use crate::http::response::Reply;
use crate::http::stream::Stream;
use crate::http::tls::Acceptor;
use crate::log::{Level, Log, printable};
use crate::metrics::Metrics;
use crate::places::{Place, Places, State};
use crate::rule::list::{List, ListOptions, ListReport};
use crate::rule::whitelist::{Permitted, Whitelist};
use crate::rule::{Action, Chain, Iface, RuleTemplate};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How long a whole head may take, TLS handshake included; a connection that
/// is kept may be silent for as long. With the second in which it is closed, who
/// sends none is gone after ten.
const HEAD_TIME: Duration = Duration::from_secs(9);
/// Connections that one listener serves at a time, a thread each.
const MAX_CONNECTIONS: usize = 128;
/// Connections of one listener that are accepted and wait for a place: a burst waits
/// here, because the kernel's queue (128, by std) drops what it has no room for, and
/// a client tries again only after a second. All together stay under 1,024
/// descriptors, with some left for the programs.
const MAX_ARRIVALS: usize = 128;
/// What a thread may use as stack; a TLS handshake takes some 30 KiB.
const STACK: usize = 256 * 1024;

/// Lists that are received at a time, 20 bytes an entry in memory.
const MAX_RECEIVED: usize = 16;
/// Lists that are sent at a time: without sets each sits in memory meanwhile.
const MAX_SENT: usize = 4;
/// How much of a request line goes into the log.
const MAX_LOGGED: usize = 300;

const NO_BODY: Refusal = Refusal::Http(413, "This request takes no body; send none.");

/// What all listeners share.
pub struct Server {
    pub firewall: Firewall,
    pub whitelist: Arc<Whitelist>,
    pub log: Arc<Log>,
    pub metrics: Arc<Metrics>,
    pub grammar: Grammar,
    pub credentials: Option<Credentials>,
    pub guesses: Guesses,
    /// Held once more for each list that is being received, and sent.
    pub received: Arc<()>,
    pub sent: Arc<()>,
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
    places: Arc<Places>,
}

impl Door {
    fn new(listener: TcpListener, tls: Option<Acceptor>, authentication: bool) -> Door {
        Door { listener, tls, authentication, places: Places::new(MAX_CONNECTIONS) }
    }

    /// Binds what rfw.conf names. The error is a sentence.
    pub fn open(config: &Config, acceptor: Option<Acceptor>) -> Result<Vec<Door>, String> {
        let mut doors = Vec::new();
        if let (Some(outward), Some(acceptor)) = (&config.outward, acceptor) {
            let listener = bind(outward.ip, outward.port, "outward.server")?;
            doors.push(Door::new(listener, Some(acceptor), true));
        }
        if let Some(Local { port, authentication }) = config.local {
            // Where the host has no ::1, there is no such address to bind.
            let v6 =
                TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).map(|_| Ipv6Addr::LOCALHOST.into());
            for ip in [Ok(Ipv4Addr::LOCALHOST.into()), v6].into_iter().flatten() {
                let listener = bind(ip, port, "local.server")?;
                doors.push(Door::new(listener, None, authentication));
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
            false => Err(Refusal::Http(400, "The Host must be localhost, 127.0.0.1 or [::1].")),
        }
    }
}

fn bind(ip: IpAddr, port: u16, key: &str) -> Result<TcpListener, String> {
    TcpListener::bind((ip, port)).map_err(|error| {
        let what_to_do = match error.kind() {
            ErrorKind::AddrNotAvailable => "set it to an address of this host",
            _ => "choose another port, or stop who uses this one",
        };
        format!("cannot listen on {ip} port {port} ({key}): {error}; {what_to_do}")
    })
}

impl Server {
    /// Accepts for ever, and hands on who may come in.
    pub fn listen(self: &Arc<Server>, door: Door) {
        let door = Arc::new(door);
        let (arrive, arrivals) = mpsc::sync_channel(MAX_ARRIVALS);
        let (server, entrance) = (self.clone(), door.clone());
        thread::spawn(move || {
            arrivals.into_iter().for_each(|(socket, peer)| server.seat(&entrance, socket, peer));
        });
        loop {
            match door.listener.accept() {
                Ok((socket, peer)) => {
                    let peer = peer.ip().to_canonical();
                    if door.tls.is_none() || self.whitelist.admits(peer) {
                        let _ = arrive.send((socket, peer));
                    } else {
                        self.log.write(Level::Debug, format_args!("{peer} is not whitelisted"));
                    }
                }
                Err(error) => {
                    self.log.warning(format_args!("cannot accept a connection: {error}"));
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Finds a place for a connection, and a thread that serves it.
    fn seat(self: &Arc<Server>, door: &Arc<Door>, socket: TcpStream, peer: IpAddr) {
        let socket = Arc::new(socket);
        let Some(place) = door.places.take(&socket) else {
            if let (None, Ok(mut stream)) = (&door.tls, Stream::new(socket, None)) {
                let busy = Refusal::Busy("All places are taken.".into());
                Reply::new(&mut stream, None).refuse(&busy);
            }
            return;
        };
        let (server, door) = (self.clone(), door.clone());
        self.metrics.connections.add(1);
        let serve = move || {
            server.metrics.open_connections.add(1);
            if let Ok(stream) = Stream::new(socket, door.tls.as_ref()) {
                serve(&server, &door, stream, peer, &place);
            }
            server.metrics.open_connections.less_one();
        };
        if let Err(error) = thread::Builder::new().stack_size(STACK).spawn(serve) {
            self.log.warning(format_args!("cannot serve {peer}: {error}"));
        }
    }
}

/// One connection: who came through which door, and holds which place.
struct Visit<'a> {
    server: &'a Server,
    door: &'a Door,
    peer: IpAddr,
    place: &'a Place,
    /// Since when it is served: requests that came together are one service.
    since: Instant,
}

/// Serves one connection: head, request, answer, and again.
fn serve(server: &Server, door: &Door, mut stream: Stream, peer: IpAddr, place: &Place) {
    let mut visit = Visit { server, door, peer, place, since: Instant::now() };
    loop {
        stream.give(HEAD_TIME);
        let waits = !stream.has_received();
        if waits {
            place.is(State::Waiting(Instant::now()));
        } else {
            // Others first: many that pipeline would hold up those who ask for one thing.
            thread::yield_now();
        }
        let Some(request) = stream.request() else {
            return if place.is_cut() { drop(stream) } else { stream.close() };
        };
        let started = Instant::now();
        if waits {
            visit.since = started;
        }
        place.is(State::Serving(visit.since));
        let mut who = format!("{peer} -");
        let mut reply = Reply::new(&mut stream, request.as_ref().ok());
        let result = match &request {
            Ok(request) => visit.carry_out(request, &mut reply, &mut who),
            Err(refusal) => Err(refusal.clone()),
        };
        let result = result.unwrap_or_else(|refusal| reply.refuse(&refusal));
        let keep = reply.keep;
        record(server, request.ok(), &who, &result, started.elapsed());
        if !keep {
            place.is(State::Waiting(started)); // it is of no more use
            return if place.is_cut() { drop(stream) } else { stream.close() };
        }
    }
}

impl Visit<'_> {
    /// From the request to the kernel and the answer; the result is for the log.
    fn carry_out(
        &self,
        request: &Request,
        reply: &mut Reply<'_>,
        who: &mut String,
    ) -> Result<String, Refusal> {
        let Visit { server, door, peer, .. } = self;
        door.check_host(request)?;
        let credentials = server.credentials.as_ref().filter(|_| door.authentication);
        let authorization = request.authorization.as_deref();
        let client =
            auth::admit(*peer, authorization, credentials, &server.guesses, Instant::now())
                .inspect_err(|_| server.metrics.refused_logins.add(1))?;
        *who = client.to_string();
        let command = Command::parse(request, server.grammar)?;
        if request.body != Body::Length(0) && !matches!(command, Command::ChangeAll(..)) {
            return Err(NO_BODY);
        }
        // Counted apart: a slow sender of lists holds up no listing.
        let lists = match command {
            Command::ChangeAll(..) => Some((server.received.clone(), MAX_RECEIVED)),
            Command::List(_) => Some((server.sent.clone(), MAX_SENT)),
            _ => None,
        };
        // The server holds each once itself.
        let count = |held| Arc::strong_count(held).saturating_sub(1);
        if lists.as_ref().is_some_and(|(held, most)| count(held) > *most) {
            return Err(Refusal::Busy("Too many lists are on their way.".into()));
        }
        match command {
            Command::Help => {
                reply.push(&api::help(&server.addresses, server.grammar));
                reply.end("text/plain; charset=utf-8");
                Ok("helped".into())
            }
            Command::Metrics => {
                reply.push(&server.metrics.text());
                reply.end("text/plain; version=0.0.4; charset=utf-8");
                Ok("measured".into())
            }
            Command::List(chain) => send_list(server, &client, chain, reply),
            Command::Change(rule, action) => {
                let own = host::own_addresses(&rule.addresses().collect::<Vec<_>>());
                let change = server.whitelist.permit(rule, action, &own);
                let outcome = self.apply(&client, change.map_err(Refusal::Whitelisted)?)?;
                let json = api::outcome_json(&rule, &outcome);
                self.send_outcome(json, rule.ifaces().into(), reply, who);
                Ok(outcome.tally.single().map_or("", Verdict::name).into())
            }
            Command::ChangeAll(template, action, options) => {
                let (change, report) = self.read_list(request, reply, template, action, options)?;
                let tally = self.apply(&client, change)?.tally;
                let ifaces = [template.in_iface, template.out_iface];
                let json = api::tally_json(action, &tally, &report);
                self.send_outcome(json, ifaces, reply, who);
                let word = |name: &str, n| format!(" {n} {},", name.trim_end_matches("_count"));
                let counts = api::tally_of(action, &tally, word) + &api::report_of(&report, word);
                Ok(format!("applied:{}", counts.trim_end_matches(',')))
            }
        }
    }

    fn read_list(
        &self,
        request: &Request,
        reply: &mut Reply<'_>,
        template: RuleTemplate,
        action: Action,
        options: ListOptions,
    ) -> Result<(Permitted, ListReport), Refusal> {
        let (whitelist, own) = (&self.server.whitelist, host::own_addresses(&[]));
        let mut list = List::new(whitelist, &own, template, action, options);
        reply.receive(request, |bytes| list.push(bytes).map_err(Refusal::List))?;
        list.finish().map_err(Refusal::List)
    }

    /// Sends the JSON of a change, with a note where this host lacks an interface of the rule: a
    /// typing error would look like success.
    fn send_outcome(&self, json: String, ifaces: [Iface; 2], reply: &mut Reply<'_>, who: &str) {
        let json = match host::missing_interface(ifaces) {
            None => json,
            Some(note) => {
                self.server.log.warning(format_args!("{who}: {note}"));
                api::with_note(&json, &note)
            }
        };
        reply.push(&json);
        reply.end("application/json");
    }

    fn apply(&self, client: &Client, change: Permitted) -> Result<Outcome, Refusal> {
        self.place.is(State::Working);
        let outcome = self.server.firewall.apply(client, change);
        self.place.is(State::Serving(self.since));
        outcome
    }
}

fn send_list(
    server: &Server,
    client: &Client,
    chain: Option<Chain>,
    reply: &mut Reply<'_>,
) -> Result<String, Refusal> {
    let mut before = "[";
    let mut push = |number: usize, tagged: &TaggedRule| {
        let go_on = reply.push(before) && reply.push(&api::listed_json(number, tagged));
        before = ",\n";
        go_on
    };
    for (number, tagged) in server.firewall.list(client, chain)? {
        let mut here = true;
        if tagged.rule.template().is_none() {
            here = push(number, &tagged);
        } else {
            server.firewall.entries(&tagged.rule, |entry| {
                here = push(number, entry);
                here
            })?;
        }
        if !here {
            break;
        }
    }
    reply.push(if before == "[" { "[]\n" } else { "]\n" });
    reply.end("application/json");
    Ok("listed".into())
}

/// One line for every change, made or refused, and for wrong credentials; other
/// requests at DEBUG.
fn record(server: &Server, request: Option<Request>, who: &str, result: &str, took: Duration) {
    let change = request.as_ref().is_some_and(|r| r.method != "GET" || api::modifies(r));
    let told = change || result.starts_with("401");
    let level = match result.starts_with('5') {
        true => Level::Warning,
        false if told => Level::Info,
        false => Level::Debug,
    };
    let line = request.map_or("-".into(), |request| request.line());
    let line = line.as_bytes().get(..MAX_LOGGED).unwrap_or(line.as_bytes());
    let (line, took) = (printable(line), took.as_secs_f64() * 1e3);
    server.log.write(level, format_args!("{who} \"{line}\" {result} {took:.1} ms"));
}
