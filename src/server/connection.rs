//! The whole life of a request, from top to bottom.

use super::Server;
use super::limiter::{Client, ConnectionLimiter, Limits, Slot};
use super::listener::Listener;
use crate::api::{self, Command};
use crate::firewall::iptables::TaggedRule;
use crate::firewall::list::{Tally, Verdict};
use crate::host;
use crate::http::api_error::ApiError;
use crate::http::auth::{self, Principal};
use crate::http::request::{Body, Request};
use crate::http::response::ResponseWriter;
use crate::http::stream::HttpStream;
use crate::http::tls;
use crate::log::{Level, printable};
use crate::rule::list::{List, ListReport};
use crate::rule::rights::{Allowed, Intent};
use crate::rule::tag::Tag;
use crate::rule::whitelist::{Permitted, Sieve};
use crate::rule::{Action, Filter, Iface};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Lists that are received at a time, with 20 bytes of memory per entry. A client that sends less
/// than 16 KiB/s can be evicted.
pub const UPLOADS: Limits = Limits {
    slots: 16,
    evicting: 0,
    patience: Duration::from_secs(1),
    poll: Duration::from_millis(10),
};
/// Long listings that are sent at a time. Without sets, each is kept in memory meanwhile: 24 MB for
/// 100,000 rules. More patience, because a full buffer of 4 MB becomes writable when a third of it is
/// free: a client that reads 700 KB/s seems to pause for 2 s.
pub const LISTINGS: Limits = Limits { slots: 4, patience: Duration::from_secs(2), ..UPLOADS };
/// One listing at a time is read from the kernel, so that a change waits for at most one.
pub const READING: Limits = Limits { slots: 1, ..UPLOADS };
/// The most rules of a short listing: 23 KB, which fit in the socket's buffer.
const SHORT_LISTING: usize = 100;

/// How long a whole head may take, TLS handshake included, and how long a connection may be idle.
/// It takes one more second to close: an idle client is disconnected after 10 s.
const HEAD_TIME: Duration = Duration::from_secs(9);
/// How many bytes of a request line are logged.
const MAX_LOGGED: usize = 300;

const HOST: ApiError = ApiError::Http(400, "The Host must be localhost, 127.0.0.1 or [::1].");
const NO_BODY: ApiError = ApiError::Http(413, "This request takes no body; send none.");
const EVICTED: ApiError = ApiError::Http(408, "The body arrived too slowly while others waited.");

pub struct Connection<'a> {
    pub server: &'a Server,
    pub listener: &'a Listener,
    pub client: Arc<Client>,
}

impl Connection<'_> {
    /// Serves request after request.
    pub fn serve(&self, mut stream: HttpStream) {
        while self.exchange(&mut stream) {}
        if !self.client.is_evicted() {
            stream.close();
        }
    }

    /// Serves one request; returns whether another may follow.
    fn exchange(&self, stream: &mut HttpStream) -> bool {
        self.client.start_patience();
        stream.set_deadline(HEAD_TIME);
        if stream.has_received() {
            // Others first: otherwise, pipelined requests would delay single ones.
            thread::yield_now();
        }
        let mut request = match stream.request() {
            Ok(request) => request,
            Err(error) => {
                if let Some(reason) = tls::describe_handshake_error(&error) {
                    self.server.log.handshake(self.client.ip, &reason);
                }
                return false;
            }
        };
        let started = Instant::now();
        let is_wanted = self.client.work(|| self.listener.limiter.is_wanted());
        if let (Ok(request), true) = (&mut request, is_wanted) {
            request.keep_alive = false;
        }
        let mut subject = format!("{} -", self.client.ip);
        let mut response = ResponseWriter::new(stream, request.as_ref().ok());
        let result = match &request {
            Ok(request) => self.carry_out(request, &mut response, &mut subject),
            Err(error) => Err(error.clone()),
        };
        let result = result.unwrap_or_else(|error| response.refuse(&error));
        let keep = response.keep_alive;
        self.record(request.ok().as_ref(), &subject, &result, started.elapsed());
        keep
    }

    /// From the request to the kernel and the response; returns the result for the log.
    fn carry_out(
        &self,
        request: &Request,
        response: &mut ResponseWriter<'_>,
        subject: &mut String,
    ) -> Result<String, ApiError> {
        let (principal, command) = self.admit(request, subject)?;
        match command {
            Command::Help => {
                response.content_type = "text/plain; charset=utf-8";
                response.end(&api::help(&self.server.addresses, self.server.grammar));
                Ok("help".into())
            }
            Command::Metrics => {
                response.content_type = "text/plain; version=0.0.4; charset=utf-8";
                response.end(&self.server.metrics.text());
                Ok("metrics".into())
            }
            Command::List(filter) => self.send_listing(&principal, &filter, response),
            Command::DeleteTag(intent, chain) => {
                let allowed = allow(&principal, intent, subject)?;
                let change = Permitted::delete_tag(allowed, chain);
                let apply = || self.server.firewall.apply(&principal, change);
                let tally = self.client.work(apply)?.tally;
                response.end(&api::tally_json(Action::Delete, &tally, &ListReport::default()));
                Ok(format!("applied: {} deleted", tally.of(Verdict::Deleted)))
            }
            Command::Change(rule, intent) => {
                let allowed = allow(&principal, intent, subject)?;
                let own = || host::own_addresses(&rule, &self.server.log);
                let permitted = self.server.whitelist.permit(rule, allowed, own);
                let change = permitted.map_err(ApiError::Whitelisted)?;
                let apply = || self.server.firewall.apply(&principal, change);
                let outcome = self.client.work(apply)?;
                let json = api::outcome_json(&rule, allowed.tag(), &outcome);
                self.send_outcome(json, rule.ifaces().into(), response, subject);
                Ok(outcome.tally.single().map_or("", Verdict::name).into())
            }
            Command::ChangeAll(template, intent, options) => {
                let allowed = allow(&principal, intent, subject)?;
                let own = host::list_addresses(&self.server.log);
                let sieve = Sieve::new(&self.server.whitelist, &own, template, allowed);
                let list = List::new(sieve, options);
                let (tally, report) = self.change_all(request, &principal, list, response)?;
                let action = allowed.action();
                let ifaces = [template.in_iface, template.out_iface];
                let json = api::tally_json(action, &tally, &report);
                self.send_outcome(json, ifaces, response, subject);
                let counts = api::counts(action, &tally, &report);
                let count =
                    |(name, n): &(&str, usize)| format!("{n} {}", name.trim_end_matches("_count"));
                let counts: Vec<String> = counts.iter().map(count).collect();
                Ok(format!("applied: {}", counts.join(", ")))
            }
        }
    }

    /// Authenticates the client and parses what it requests. `subject` is set to the client and
    /// user, for the log.
    fn admit(
        &self,
        request: &Request,
        subject: &mut String,
    ) -> Result<(Principal, Command), ApiError> {
        let server = self.server;
        // The local server accepts only the names of this host. A web page in a local browser whose
        // name resolves to 127.0.0.1 (DNS rebinding) sends another name.
        if self.listener.tls.is_none() && !request.is_for_localhost() {
            return Err(HOST);
        }
        let users = self.listener.authentication.then_some(&server.users);
        let authorization = request.authorization.as_deref();
        let now = Instant::now();
        let principal =
            auth::authenticate(self.client.ip, authorization, users, &server.throttle, now)
                .inspect_err(|_| server.metrics.refused_logins.add(1))?;
        *subject = principal.to_string();
        let command = Command::parse(request, server.grammar)?;
        if request.body != Body::Length(0) && !matches!(command, Command::ChangeAll(..)) {
            return Err(NO_BODY);
        }
        Ok((principal, command))
    }

    fn change_all(
        &self,
        request: &Request,
        principal: &Principal,
        mut list: List,
        response: &mut ResponseWriter<'_>,
    ) -> Result<(Tally, ListReport), ApiError> {
        let _turn = self.await_turn(&self.server.uploads)?;
        let received = response.receive(request, |bytes| {
            self.client.progress(bytes.len());
            list.push(bytes).map_err(ApiError::List)
        });
        received.map_err(|error| if self.client.is_evicted() { EVICTED } else { error })?;
        self.client.work(|| {
            let (change, report) = list.finish().map_err(ApiError::List)?;
            Ok((self.server.firewall.apply(principal, change)?.tally, report))
        })
    }

    /// Sends the JSON of a change, with a note if this host lacks an interface of the rule: a typo
    /// would look like success.
    fn send_outcome(
        &self,
        mut json: String,
        ifaces: [Iface; 2],
        response: &mut ResponseWriter<'_>,
        subject: &str,
    ) {
        if let Some(note) = host::missing_interface(ifaces) {
            self.server.log.warning(format_args!("{subject}: {note}"));
            json = api::with_note(&json, &note);
        }
        response.end(&json);
    }

    /// A short listing needs no slot of `listings`: it delays no other request, and 128 of them take
    /// little memory.
    fn send_listing(
        &self,
        principal: &Principal,
        filter: &Filter,
        response: &mut ResponseWriter<'_>,
    ) -> Result<String, ApiError> {
        let server = self.server;
        // A query for an address selects few rules, unless the rule of a whole set is among them.
        let is_query = filter.net.is_some();
        let mut is_long = !is_query && server.metrics.rules_in(filter) > SHORT_LISTING;
        let (mut listing, _turn) = loop {
            let turn = is_long.then(|| self.await_turn(&server.listings)).transpose()?;
            let wait = || self.await_turn(&server.reading);
            // A client with a slot is not evicted from it while it waits for rfw.
            let reading = if is_long { self.client.work(wait) } else { wait() }?;
            let listing = self.client.work(|| server.firewall.list(principal, filter))?;
            drop(reading);
            let is_set = |(_, listed): &(usize, TaggedRule)| listed.rule.template().is_some();
            let is_short =
                listing.len() <= SHORT_LISTING && !(is_query && listing.iter().any(is_set));
            if is_long || is_short {
                break (listing, turn);
            }
            is_long = true; // it has grown since it was counted, or is a query for many addresses
        };
        listing.shrink_to_fit(); // nearly half of it may be unused
        response.push("[");
        let (mut before, mut is_sent) = ("", true);
        for (number, listed) in listing {
            let mut push = |rule: &TaggedRule| {
                let json = api::listed_json(number, rule);
                is_sent = self.client.wait(|| response.push(before) && response.push(&json));
                before = ",\n";
                is_sent
            };
            self.client.work(|| server.firewall.entries(&listed, filter, &mut push))?;
            if !is_sent {
                return Ok("listed in part".into());
            }
        }
        response.end("]\n");
        Ok("listed".into())
    }

    fn await_turn(&self, limiter: &Arc<ConnectionLimiter>) -> Result<Slot, ApiError> {
        let busy = || ApiError::Busy("Other lists did not end within 5 s.".into());
        self.client.acquire(limiter).ok_or_else(busy)
    }

    /// One line for every change, made or refused, and for wrong credentials; other
    /// requests at DEBUG.
    fn record(&self, request: Option<&Request>, subject: &str, result: &str, took: Duration) {
        let is_change = request.is_some_and(|r| r.method != "GET" || api::modifies(r));
        let level = match result.get(..3).unwrap_or_default() {
            status if status.starts_with('5') => Level::Warning,
            "401" | "429" => Level::Info,
            // What cannot be parsed may have been meant as a change.
            _ if is_change || request.is_none() => Level::Info,
            _ => Level::Debug,
        };
        let line = request.map_or("-".into(), Request::line);
        let line = line.as_bytes().get(..MAX_LOGGED).unwrap_or(line.as_bytes());
        let (line, took) = (printable(line), took.as_secs_f64() * 1e3);
        let event = format_args!("{subject} \"{line}\" {result} {took:.1} ms");
        match result.starts_with(['4', '5']) {
            true => self.server.log.refusal(self.client.ip, level, event),
            false => self.server.log.write(level, event),
        }
    }
}

/// Checks that the client may make a change, and adds its tag to `subject`.
fn allow(principal: &Principal, intent: Intent, subject: &mut String) -> Result<Allowed, ApiError> {
    let allowed = api::allow(intent, principal.rights())?;
    if allowed.tag() != Tag::NONE {
        *subject = format!("{principal} {}", allowed.tag());
    }
    Ok(allowed)
}
