//! The REST API: a request to a command, and what became of it to JSON.

use crate::firewall::Outcome;
use crate::firewall::kernel::Owned;
use crate::http::json;
use crate::http::request::Request;
use crate::http::response::Refusal;
use crate::rule::{Action, Chain, Change, Iface, Rule, RuleError, interval};

/// What a client may ask for.
#[derive(PartialEq, Eq, Debug)]
pub enum Command {
    /// The help text.
    Help,
    /// The rules of one chain or of all.
    List(Option<Chain>),
    /// A rule more or less.
    Change(Change),
}

/// The parts of the grammar that rfw.conf sets.
#[derive(Clone, Copy, Debug)]
pub struct Grammar {
    /// The expiry in seconds of a PUT without `expire`; 0 is never.
    pub default_expire: u64,
    /// Whether GET may change rules.
    pub non_restful: bool,
}

/// The query parameters that have a meaning.
#[derive(Default)]
struct Query {
    expire: Option<String>,
    modify: Option<String>,
    wait: Option<String>,
}

impl Command {
    /// Reads method, path and query.
    pub fn parse(request: &Request, grammar: Grammar) -> Result<Command, Refusal> {
        let path = request.path.strip_suffix('/').unwrap_or(&request.path);
        let segments = path.split('/').skip(1).map(decode).collect::<Option<Vec<_>>>();
        let segments = segments.ok_or(Refusal::Rule(RuleError::Shape))?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let query = Query::parse(request.query.as_deref())?;
        match *segments {
            [] => query.only_get(request, Command::Help),
            ["list"] => query.only_get(request, Command::List(None)),
            ["list", chain] => {
                let chain = Chain::parse(chain).ok_or(Refusal::NotFound)?;
                query.only_get(request, Command::List(Some(chain)))
            }
            _ => query.change(request, Rule::parse(&segments), grammar),
        }
    }
}

impl Query {
    fn parse(query: Option<&str>) -> Result<Query, Refusal> {
        let mut parsed = Query::default();
        for pair in
            query.unwrap_or_default().split('&').filter(|_| query.is_some_and(|q| !q.is_empty()))
        {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let wrong = |what: &str| Refusal::Query(format!("The parameter '{name}' {what}."));
            let slot = match name {
                "expire" => &mut parsed.expire,
                "modify" => &mut parsed.modify,
                "wait" => &mut parsed.wait,
                _ => return Err(wrong("is unknown; take expire=INTERVAL")),
            };
            let value = decode(value).ok_or_else(|| wrong("holds a wrong %XX escape"))?;
            if slot.replace(value).is_some() {
                return Err(wrong("stands twice"));
            }
        }
        match parsed.wait.as_deref() {
            None | Some("true") => Ok(parsed),
            Some(_) => Err(Refusal::Query("The parameter 'wait' can only be true.".into())),
        }
    }

    fn only_get(&self, request: &Request, command: Command) -> Result<Command, Refusal> {
        if request.method != "GET" {
            return Err(Refusal::Method("GET"));
        }
        match self.expire.is_some() || self.modify.is_some() {
            true => Err(Refusal::Query("This path takes no parameters.".into())),
            false => Ok(command),
        }
    }

    fn change(
        self,
        request: &Request,
        rule: Result<Rule, RuleError>,
        grammar: Grammar,
    ) -> Result<Command, Refusal> {
        if rule == Err(RuleError::Unknown) {
            return Err(Refusal::NotFound);
        }
        let put = match (request.method.as_str(), self.modify.as_deref()) {
            ("PUT", None) => true,
            ("DELETE", None) => false,
            ("GET", Some("insert")) if grammar.non_restful => true,
            ("GET", Some("delete")) if grammar.non_restful => false,
            ("GET", _) if grammar.non_restful => {
                return Err(Refusal::Query("GET takes modify=insert or modify=delete.".into()));
            }
            ("PUT" | "DELETE", Some(_)) => {
                return Err(Refusal::Query("The parameter 'modify' goes with GET only.".into()));
            }
            _ if grammar.non_restful => return Err(Refusal::Method("GET, PUT, DELETE")),
            _ => return Err(Refusal::Method("PUT, DELETE")),
        };
        let rule = rule.map_err(Refusal::Rule)?;
        let action = match (put, self.expire) {
            (true, None) => Action::Put(grammar.default_expire),
            (true, Some(text)) => Action::Put(interval::parse(&text).ok_or(Refusal::Expire(text))?),
            (false, None) => Action::Delete,
            (false, Some(_)) => {
                return Err(Refusal::Query("The parameter 'expire' goes with PUT only.".into()));
            }
        };
        Ok(Command::Change(Change { rule, action }))
    }
}

/// What `GET /` answers.
pub fn help(addresses: &str, grammar: Grammar) -> String {
    let expire = match grammar.default_expire {
        0 => "for ever".into(),
        seconds => format!("{seconds} s"),
    };
    let get = match grammar.non_restful {
        true => "GET    the same path?modify=insert or delete      as PUT and DELETE\n",
        false => "",
    };
    include_str!("help.txt")
        .replace("VERSION", env!("CARGO_PKG_VERSION"))
        .replace("ADDRESSES", addresses)
        .replace("DEFAULT", &expire)
        .replace("GETS", get)
}

/// Decodes `%XX` once (RFC 3986, 2.1); `None` if the bytes are not UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next()?.as_bytes().to_vec();
    for piece in pieces {
        let (digits, rest) = piece.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

/// Whether a GET asks for a change, allowed or not.
pub fn modifies(request: &Request) -> bool {
    request.query.as_deref().is_some_and(|query| query.contains("modify="))
}

/// The answer to a change.
pub fn outcome_json(Outcome { verdict, rule, expires }: &Outcome) -> String {
    format!(
        "{{\"result\":\"{}\",\"rule\":{{\"chain\":\"{}\",\"target\":\"{}\",{}}},\"expires\":{}}}\n",
        verdict.name(),
        rule.chain().name(),
        rule.target.name(),
        ends_json(rule),
        json::number(*expires)
    )
}

/// One element of the list; `place` is the rule's number in its chain.
pub fn listed_json(place: usize, owned: &Owned) -> String {
    let Owned { rule, tag, counters: (packets, bytes) } = owned;
    format!(
        "{{\"chain\":\"{}\",\"num\":\"{place}\",\"pkts\":\"{packets}\",\"bytes\":\"{bytes}\",\
         \"target\":\"{}\",\"prot\":\"all\",\"opt\":\"--\",{},\"extra\":\"\",\"expires\":{}}}",
        rule.chain().name(),
        rule.target.name(),
        ends_json(rule),
        json::number(tag.expires())
    )
}

/// Interfaces and addresses; none of them holds a character to be escaped.
fn ends_json(rule: &Rule) -> String {
    let (inp, out) = rule.ifaces();
    let (source, destination) = rule.ends();
    let name = |iface: Iface| match iface {
        Iface::ANY => "*".into(),
        iface => iface.to_string(),
    };
    format!(
        "\"inp\":\"{}\",\"out\":\"{}\",\"source\":\"{source}\",\"destination\":\"{destination}\"",
        name(inp),
        name(out)
    )
}
