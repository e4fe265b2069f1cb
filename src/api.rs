//! The REST API: requests to commands, outcomes to JSON.

use crate::firewall::iptables::{KernelRule, TaggedRule};
use crate::firewall::list::{Outcome, Tally, Verdict};
use crate::http::api_error::{ApiError, lines_json};
use crate::http::json;
use crate::http::request::{Body, Request};
use crate::rule::interval::{self, LONGEST_IN_SET};
use crate::rule::list::{ListError, ListOptions, ListReport};
use crate::rule::net::Net;
use crate::rule::rights::{Allowed, Intent, Rights};
use crate::rule::tag::Tag;
use crate::rule::{Action, Chain, Filter, Iface, Rule, RuleError, RuleTemplate};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What a client requests. [`allow`] checks whether the user may do it.
#[derive(PartialEq, Eq, Debug)]
pub enum Command {
    Help,
    Metrics,
    /// The rules in the kernel that a filter selects.
    List(Filter),
    /// Delete all rules with a tag, in one chain or in all.
    DeleteTag(Intent, Option<Chain>),
    /// Insert or delete one rule.
    Change(Rule, Intent),
    /// Insert or delete a template's rules for the addresses in the body.
    ChangeAll(RuleTemplate, Intent, ListOptions),
}

/// The settings of rfw.conf that the grammar depends on.
#[derive(Clone, Copy, Debug)]
pub struct Grammar {
    /// The expiry in seconds of a PUT without `expire`; 0 means never.
    pub default_expire: u64,
    /// Whether GET may change rules.
    pub non_restful: bool,
    /// Whether addresses are kept in sets, which limits `expire`.
    pub sets: bool,
    /// Whether this host filters IPv6.
    pub ipv6: bool,
}

/// The query parameters, by name.
struct Query<'a>(BTreeMap<&'a str, String>);

impl Command {
    /// Parses method, path and query.
    pub fn parse(request: &Request, grammar: Grammar) -> Result<Command, ApiError> {
        let path = request.path.strip_suffix('/').unwrap_or(&request.path);
        let segments = path.split('/').skip(1).map(decode).collect::<Option<Vec<_>>>();
        let segments = segments.ok_or(ApiError::Rule(RuleError::Shape))?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let query = Query::parse(request.query.as_deref())?;
        match *segments {
            [] => query.only_get(request, Command::Help),
            ["metrics"] => query.only_get(request, Command::Metrics),
            ["list"] => query.list(request, None),
            ["list", chain] => {
                let chain = Chain::parse(chain).ok_or(ApiError::Rule(RuleError::Unknown))?;
                query.list(request, Some(chain))
            }
            [_, _, _] => {
                let lenient = query.get("lenient").is_some();
                let template = RuleTemplate::parse(&segments);
                let intent = query.intent(request, template.as_ref().err(), true, grammar)?;
                let template = template.map_err(ApiError::Rule)?;
                if request.body == Body::Length(0) {
                    return Err(ApiError::List(ListError::Empty));
                }
                grammar.check_expire(intent.action, true)?;
                let options = ListOptions { lenient, ipv6: grammar.ipv6 };
                Ok(Command::ChangeAll(template, intent, options))
            }
            _ => {
                let rule = parse_rule(&segments, request.body != Body::Length(0));
                let intent = query.intent(request, rule.as_ref().err(), false, grammar)?;
                let rule = rule.map_err(ApiError::Rule)?;
                if matches!(intent.action, Action::Put(_)) {
                    check_new(&rule).map_err(ApiError::Rule)?;
                }
                grammar.check_expire(intent.action, rule.template().is_some())?;
                Ok(Command::Change(rule, intent))
            }
        }
    }
}

/// Refuses forms that rules can have, but that nobody means. An interface can have the name of an
/// address, but here it is a netmask, or an address whose interface is missing.
fn check_new(rule: &Rule) -> Result<(), RuleError> {
    if rule.addresses().next().is_none() {
        return Err(RuleError::NoAddress);
    }
    let names = <[Iface; 2]>::from(rule.ifaces()).map(|iface| iface.to_string());
    match names.into_iter().find(|name| name.parse::<IpAddr>().is_ok()) {
        Some(name) => Err(RuleError::Iface(name)),
        None => Ok(()),
    }
}

/// Checks whether these rights permit a change.
pub fn allow(intent: Intent, rights: &Rights) -> Result<Allowed, ApiError> {
    let allowed = rights.allow(intent).map_err(ApiError::Forbidden)?;
    match (allowed.action(), allowed.tag()) {
        (Action::Replace(_), Tag::NONE) => {
            Err(ApiError::Query("The parameter 'replace' requires a tag: tag=NAME.".into()))
        }
        _ => Ok(allowed),
    }
}

impl Grammar {
    /// Refuses an expiry that is too long for a set, if the address is kept in one.
    fn check_expire(self, action: Action, in_set: bool) -> Result<(), ApiError> {
        match action.expire() {
            Some(seconds) if self.sets && in_set && seconds > LONGEST_IN_SET.into() => {
                Err(ApiError::LongExpire)
            }
            _ => Ok(()),
        }
    }
}

impl<'a> Query<'a> {
    fn parse(query: Option<&'a str>) -> Result<Query<'a>, ApiError> {
        let mut values = BTreeMap::new();
        let query = query.filter(|query| !query.is_empty());
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let invalid = |problem| ApiError::Query(format!("The parameter '{name}' {problem}."));
            let value = decode(value).ok_or_else(|| invalid("has an invalid %XX escape"))?;
            if matches!(name, "wait" | "replace" | "lenient") && value != "true" {
                return Err(invalid("must be true"));
            }
            if values.insert(name, value).is_some() {
                return Err(invalid("occurs twice"));
            }
        }
        Ok(Query(values))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Refuses all parameters but those that a request takes, and `wait`.
    fn check_names(&self, is_taken: impl Fn(&str) -> bool) -> Result<(), ApiError> {
        match self.0.keys().find(|name| **name != "wait" && !is_taken(name)) {
            None => Ok(()),
            Some(name) => Err(ApiError::Query(format!(
                "This request does not take the parameter '{name}'; GET / shows all requests."
            ))),
        }
    }

    fn only_get(&self, request: &Request, command: Command) -> Result<Command, ApiError> {
        if request.method != "GET" {
            return Err(ApiError::Method("GET"));
        }
        self.check_names(|_| false)?;
        Ok(command)
    }

    /// Lists or deletes rules of one chain or of all.
    fn list(&self, request: &Request, chain: Option<Chain>) -> Result<Command, ApiError> {
        let is_delete = match request.method.as_str() {
            "GET" => false,
            "DELETE" => true,
            _ => return Err(ApiError::Method("GET, DELETE")),
        };
        self.check_names(|name| name == "tag" || name == "ip" && !is_delete)?;
        let tag = self.get("tag");
        if is_delete {
            let tag = tag.ok_or(ApiError::Query("Name the tag to delete: ?tag=NAME.".into()))?;
            let intent = Intent { action: Action::Delete, tag: parse_tag(tag)? };
            return Ok(Command::DeleteTag(intent, chain));
        }
        let tag = tag.map(|tag| if tag.is_empty() { Ok(Tag::NONE) } else { parse_tag(tag) });
        let net = self.get("ip").map(|ip| Net::parse(ip).ok_or(RuleError::Address(ip.into())));
        let net = net.transpose().map_err(ApiError::Rule)?;
        Ok(Command::List(Filter { chain, tag: tag.transpose()?, net }))
    }

    /// The action and tag for the rules of a path, which may be invalid.
    fn intent(
        &self,
        request: &Request,
        path_error: Option<&RuleError>,
        is_list: bool,
        grammar: Grammar,
    ) -> Result<Intent, ApiError> {
        if path_error == Some(&RuleError::Unknown) {
            return Err(ApiError::Rule(RuleError::Unknown));
        }
        let is_put = self.is_put(request, grammar)?;
        self.check_names(|name| match name {
            "tag" => true,
            "expire" => is_put,
            "replace" => is_put && is_list,
            "lenient" => is_list,
            "modify" => request.method == "GET",
            _ => false,
        })?;
        let tag = match self.get("tag") {
            Some("*") if !is_put => {
                return Ok(Intent { action: Action::DeleteAnyTag, tag: Tag::NONE });
            }
            Some(tag) => parse_tag(tag)?,
            None => Tag::NONE,
        };
        if !is_put {
            return Ok(Intent { action: Action::Delete, tag });
        }
        let seconds = match self.get("expire") {
            None => grammar.default_expire,
            Some(text) => interval::parse(text).ok_or(ApiError::Expire(text.into()))?,
        };
        let action = if self.get("replace").is_some() { Action::Replace } else { Action::Put };
        Ok(Intent { action: action(seconds), tag })
    }

    fn is_put(&self, request: &Request, grammar: Grammar) -> Result<bool, ApiError> {
        match (request.method.as_str(), self.get("modify")) {
            ("PUT", _) => Ok(true),
            ("DELETE", _) => Ok(false),
            _ if !grammar.non_restful => Err(ApiError::Method("PUT, DELETE")),
            ("GET", Some("insert")) => Ok(true),
            ("GET", Some("delete")) => Ok(false),
            ("GET", _) => {
                Err(ApiError::Query("GET requires modify=insert or modify=delete.".into()))
            }
            _ => Err(ApiError::Method("GET, PUT, DELETE")),
        }
    }
}

fn parse_tag(text: &str) -> Result<Tag, ApiError> {
    Tag::parse(text).ok_or_else(|| ApiError::Tag(text.into()))
}

/// Parses the path of a rule. With a body, it may end in a file name: `curl -T FILE URL/` sends a
/// list to URL/FILE.
fn parse_rule(segments: &[&str], has_body: bool) -> Result<Rule, RuleError> {
    let rule = Rule::parse(segments);
    match (segments, &rule) {
        ([target, chain, iface, _], Err(RuleError::Address(_))) if has_body => {
            Err(RuleError::FileName(format!("/{target}/{chain}/{iface}")))
        }
        _ => rule,
    }
}

/// The response to `GET /`.
pub fn help(addresses: &str, grammar: Grammar) -> String {
    let expire = match grammar.default_expire {
        0 => "permanent".into(),
        seconds => format!("{seconds} s"),
    };
    let get = match grammar.non_restful {
        true => "GET    the same path?modify=insert or delete      the same as PUT and DELETE\n",
        false => "",
    };
    include_str!("help.txt")
        .replace("VERSION", env!("CARGO_PKG_VERSION"))
        .replace("ADDRESSES", addresses)
        .replace("DEFAULT", &expire)
        .replace("GETS", get)
}

/// Decodes `%XX` once (RFC 3986, 2.1); `None` if an escape is invalid or the result is not UTF-8.
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

/// Whether a GET requests a change, permitted or not.
pub fn modifies(request: &Request) -> bool {
    request.query.as_deref().is_some_and(|query| query.contains("modify="))
}

/// The response to a change of one rule.
pub fn outcome_json(rule: &Rule, tag: Tag, Outcome { tally, expires }: &Outcome) -> String {
    format!(
        "{{\"result\":\"{}\",\"rule\":{{\"chain\":\"{}\",\"target\":\"{}\",{}}},\"expires\":{},\"tag\":{}}}\n",
        tally.single().map_or("", Verdict::name),
        rule.chain().name(),
        rule.target.name(),
        match_json(rule),
        json::number(*expires),
        tag_json(tag)
    )
}

/// The response to a change of many rules.
pub fn tally_json(action: Action, tally: &Tally, report: &ListReport) -> String {
    let counts = counts(action, tally, report);
    let counts: String = counts.iter().map(|(name, n)| format!("\"{name}\":{n},")).collect();
    let whitelisted = report.whitelisted.iter().map(|line| json::string(line));
    let whitelisted = whitelisted.collect::<Vec<_>>().join(",");
    let wrong = match &report.invalid {
        Some(invalid) => format!(",\"wrong\":{}", lines_json(&invalid.lines)),
        None => String::new(),
    };
    format!("{{\"result\":\"applied\",{counts}\"whitelisted\":[{whitelisted}]{wrong}}}\n")
}

/// The count of each verdict that an action can have, then how many lines of a list were not
/// applied, for each reason.
pub fn counts(action: Action, tally: &Tally, report: &ListReport) -> Vec<(&'static str, usize)> {
    let verdicts: &[Verdict] = match action {
        Action::Put(_) | Action::Replace(_) => {
            &[Verdict::Inserted, Verdict::Refreshed, Verdict::Exists, Verdict::Deleted]
        }
        Action::Delete | Action::DeleteAnyTag => &[Verdict::Deleted, Verdict::Absent],
    };
    let mut counts: Vec<_> =
        verdicts.iter().map(|verdict| (verdict.name(), tally.of(*verdict))).collect();
    if report.ipv6_skipped > 0 {
        counts.push(("ipv6_skipped", report.ipv6_skipped));
    }
    if let Some(invalid) = &report.invalid {
        counts.push(("wrong_count", invalid.count));
    }
    counts.push(("whitelisted_count", report.whitelisted_count));
    counts
}

/// Adds a note to the end of a JSON object.
pub fn with_note(object: &str, note: &str) -> String {
    format!("{},\"note\":{}}}\n", object.trim_end_matches("}\n"), json::string(note))
}

/// One element of a listing; `number` is the rule's position in its chain.
pub fn listed_json(number: usize, tagged: &TaggedRule) -> String {
    let TaggedRule { rule: KernelRule { rule, .. }, expires, counters } = tagged;
    let (packets, bytes) =
        counters.map(|(p, b)| (p.to_string(), b.to_string())).unwrap_or_default();
    format!(
        "{{\"chain\":\"{}\",\"num\":\"{number}\",\"pkts\":\"{packets}\",\"bytes\":\"{bytes}\",\
         \"target\":\"{}\",\"prot\":\"all\",\"opt\":\"--\",{},\"extra\":\"\",\"expires\":{},\"tag\":{}}}",
        rule.chain().name(),
        rule.target.name(),
        match_json(rule),
        json::number(*expires),
        tag_json(rule.tag)
    )
}

fn tag_json(tag: Tag) -> String {
    if tag == Tag::NONE { "null".into() } else { json::string(tag.name()) }
}

/// Interfaces and addresses, none of which contains a character to be escaped.
fn match_json(rule: &Rule) -> String {
    let (in_iface, out_iface) = rule.ifaces();
    let (source, destination) = rule.sides();
    let name = |iface: Iface| match iface {
        Iface::ANY => "*".into(),
        iface => iface.to_string(),
    };
    format!(
        "\"inp\":\"{}\",\"out\":\"{}\",\"source\":\"{source}\",\"destination\":\"{destination}\"",
        name(in_iface),
        name(out_iface)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::list::Invalid;
    use crate::rule::net::{Family, Net};

    fn parse(request: &Request, grammar: Grammar) -> Result<Command, ApiError> {
        let command = Command::parse(request, grammar)?;
        if let Command::DeleteTag(intent, _)
        | Command::Change(_, intent)
        | Command::ChangeAll(_, intent, _) = command
        {
            allow(intent, &Rights::All)?;
        }
        Ok(command)
    }

    /// The command of a request line. A leading `!` turns on non.restful, a final `+` adds a body.
    fn read(line: &str) -> String {
        let (non_restful, line) = (line.starts_with('!'), line.trim_start_matches('!'));
        let (line, length) = line.strip_suffix('+').map_or((line, 0), |line| (line, 9));
        let head = format!("{line} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
        let request = Request::parse(head.as_bytes()).unwrap();
        let grammar = Grammar { default_expire: 7, non_restful, sets: true, ipv6: true };
        match parse(&request, grammar) {
            Ok(Command::Help) => "help".into(),
            Ok(Command::Metrics) => "metrics".into(),
            Ok(Command::List(Filter { chain, tag, net })) => {
                let chain = chain.map_or("all", Chain::name);
                let tag = tag.map(|tag| format!(" tag {tag}")).unwrap_or_default();
                let net = net.map(|net| format!(" ip {net}")).unwrap_or_default();
                format!("list {chain}{tag}{net}")
            }
            Ok(Command::DeleteTag(intent, chain)) => {
                format!("delete {} {}", chain.map_or("all", Chain::name), intent.tag)
            }
            Ok(Command::Change(rule, intent)) => {
                format!("{:?} {rule}{}", intent.action, intent.tag)
            }
            Ok(Command::ChangeAll(template, intent, options)) => {
                let lenient = if options.lenient { " lenient" } else { "" };
                let rule = template.rule(Net::any(Family::V4));
                format!("{:?} {rule}{} …{lenient}", intent.action, intent.tag)
            }
            Err(ApiError::Method(allow)) => format!("405 {allow}"),
            Err(error) => {
                let (status, code, _) = error.describe();
                format!("{status} {code}")
            }
        }
    }

    #[test]
    fn requests() {
        let table = [
            ("GET /", "help"),
            ("GET /metrics", "metrics"),
            ("GET /list", "list all"),
            ("GET /list/", "list all"),
            ("GET /list/Input", "list INPUT"),
            ("GET /list?wait=true", "list all"),
            ("GET /list?ip=1.2.3.4", "list all ip 1.2.3.4"),
            ("GET /list/output?ip=1.2.3.4/31&tag=feed", "list OUTPUT tag @feed ip 1.2.3.4/31"),
            ("GET /list?tag=", "list all tag "),
            ("DELETE /list?tag=feed", "delete all @feed"),
            ("DELETE /list/input/?tag=a%2eb", "delete INPUT @a.b"),
            ("PUT /drop/input/any/1.2.3.4?tag=feed", "Put(7) /drop/input/any/1.2.3.4@feed"),
            ("PUT /drop/input/any?tag=x+", "Put(7) /drop/input/any/0.0.0.0@x …"),
            ("PUT /drop/input/any?replace=true&tag=x+", "Replace(7) /drop/input/any/0.0.0.0@x …"),
            ("DELETE /drop/input/any/1.2.3.4?tag=x", "Delete /drop/input/any/1.2.3.4@x"),
            ("DELETE /drop/input/any/1.2.3.4?tag=*", "DeleteAnyTag /drop/input/any/1.2.3.4"),
            ("DELETE /drop/input/any?tag=%2a+", "DeleteAnyTag /drop/input/any/0.0.0.0 …"),
            ("PUT /drop/input/any/1.2.3.4", "Put(7) /drop/input/any/1.2.3.4"),
            ("PUT /drop/input/any/1.2.3.4/", "Put(7) /drop/input/any/1.2.3.4"),
            ("PUT /DROP/Input/any/1.2.3.4?", "Put(7) /drop/input/any/1.2.3.4"),
            ("PUT /drop/input/any/1.2.3.4?expire=0", "Put(0) /drop/input/any/1.2.3.4"),
            (
                "PUT /drop/input/any/1.2.3.4?wait=true&expire=1%6d",
                "Put(60) /drop/input/any/1.2.3.4",
            ),
            ("PUT /dro%70/input/%65th0/1.2.3.4", "Put(7) /drop/input/eth0/1.2.3.4"),
            ("DELETE /drop/input/ppp/1::%3A5", "400 bad_address"),
            ("DELETE /drop/input/ppp/1%3A:5/64", "Delete /drop/input/ppp+/1::/64"),
            ("PUT /drop/input/eth0+", "Put(7) /drop/input/eth0/0.0.0.0 …"),
            ("PUT /drop/output/ppp/?expire=100+", "Put(100) /drop/output/ppp+/0.0.0.0 …"),
            ("DELETE /accept/forward/any+", "Delete /accept/forward/any/0.0.0.0 …"),
            ("PUT /drop/input/eth0?lenient=true+", "Put(7) /drop/input/eth0/0.0.0.0 … lenient"),
            ("PUT /drop/input/eth0.5+", "Put(7) /drop/input/eth0.5/0.0.0.0 …"),
            ("DELETE /drop/forward/any/0.0.0.0", "Delete /drop/forward/any/0.0.0.0"),
            ("PUT /drop/input/any/1.2.3.4?expire=100", "Put(100) /drop/input/any/1.2.3.4"),
            (
                "PUT /drop/forward/any/1.2.3.4/any/5.6.7.8?expire=25d",
                "Put(2160000) /drop/forward/any/1.2.3.4/any/5.6.7.8",
            ),
            ("!GET /drop/input/any/1.2.3.4?modify=insert", "Put(7) /drop/input/any/1.2.3.4"),
            ("!GET /drop/input/any/1.2.3.4?modify=delete", "Delete /drop/input/any/1.2.3.4"),
            ("PUT /drop/input/any/1.2.3.4?expire=2147483", "Put(2147483) /drop/input/any/1.2.3.4"),
            (
                "!GET /drop/input/any/1.2.3.4?modify=insert&expire=5",
                "Put(5) /drop/input/any/1.2.3.4",
            ),
        ];
        for (line, command) in table {
            assert_eq!(read(line), command, "{line}");
        }
    }

    #[test]
    fn invalid_requests() {
        let table = [
            ("PUT /", "405 GET"),
            ("DELETE /metrics", "405 GET"),
            ("GET /metrics/x", "404 not_found"),
            ("HEAD /list", "405 GET, DELETE"),
            ("PUT /list?tag=x", "405 GET, DELETE"),
            ("DELETE /list", "400 bad_query"),
            ("DELETE /list?tag=", "400 bad_tag"),
            ("DELETE /list?tag=*", "400 bad_tag"),
            ("DELETE /list?tag=x&ip=1.2.3.4", "400 bad_query"),
            ("GET /list?tag=X", "400 bad_tag"),
            ("GET /list?ip=", "400 bad_address"),
            ("GET /list?ip=1.2.3.4/33", "400 bad_address"),
            ("GET /list?ip=::1&ip=::1", "400 bad_query"),
            ("GET /metrics?tag=x", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?tag=", "400 bad_tag"),
            ("PUT /drop/input/any/1.2.3.4?tag=*", "400 bad_tag"),
            ("PUT /drop/input/any/1.2.3.4?tag=a&tag=a", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?ip=1.2.3.4", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?tag=a&replace=true", "400 bad_query"),
            ("PUT /drop/input/any?replace=true+", "400 bad_query"),
            ("PUT /drop/input/any?tag=a&replace=yes+", "400 bad_query"),
            ("DELETE /drop/input/any?tag=a&replace=true+", "400 bad_query"),
            ("GET /list/nat", "404 not_found"),
            ("GET /list/input/x", "404 not_found"),
            ("GET /list?expire=1", "400 bad_query"),
            ("GET /?modify=insert", "400 bad_query"),
            ("GET /nothing", "404 not_found"),
            ("POST /nothing", "404 not_found"),
            ("GET //", "404 not_found"),
            ("PUT /drop", "400 bad_path"),
            ("PUT /drop/nat/any/1.2.3.4", "404 not_found"),
            ("PUT /drop/input", "400 bad_path"),
            ("PUT /drop/input/any", "400 empty_list"),
            ("DELETE /drop/input/any", "400 empty_list"),
            ("GET /drop/input/any", "405 PUT, DELETE"),
            ("PUT /drop/nat/any+", "404 not_found"),
            ("PUT /drop/input/feed.txt+", "400 bad_interface"),
            ("PUT /drop/input/any/feed.txt+", "400 bad_interface"),
            ("PUT /drop/input/any/feed.txt", "400 bad_address"),
            ("PUT /drop/input/all/1.2.3.4", "400 bad_interface"),
            ("PUT /drop/input/all+", "400 bad_interface"),
            ("PUT /drop/input/any?lenient=1+", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?lenient=true", "400 bad_query"),
            ("GET /list?lenient=true", "400 bad_query"),
            ("PUT /drop/forward/any/0.0.0.0", "400 bad_path"),
            ("PUT /drop/forward/eth0/::/eth1", "400 bad_path"),
            ("PUT /drop/input/-+", "400 bad_interface"),
            ("POST /drop/input/any+", "405 PUT, DELETE"),
            ("PUT /drop/input/any?expire=25d+", "400 bad_expire"),
            ("PUT /drop/input/any/1.2.3.4?expire=2147484", "400 bad_expire"),
            ("PUT /drop/input/any/1.2.3.4%2F24", "400 bad_address"),
            ("PUT /drop/input/any/1.2.3.4%ff", "400 bad_path"),
            ("PUT /drop/input/any/1.2.3.4%2524", "400 bad_address"),
            ("PUT /drop/input/any%00/1.2.3.4", "400 bad_interface"),
            ("POST /drop/input/any/1.2.3.4", "405 PUT, DELETE"),
            ("GET /drop/input/any/1.2.3.4", "405 PUT, DELETE"),
            ("GET /drop/input/any/1.2.3.4?modify=insert", "405 PUT, DELETE"),
            ("GET /drop/input/any/1.2.3.4?modify=delete", "405 PUT, DELETE"),
            ("!POST /drop/input/any/1.2.3.4", "405 GET, PUT, DELETE"),
            ("!GET /drop/input/any/1.2.3.4", "400 bad_query"),
            ("!GET /drop/input/any/1.2.3.4?modify=x", "400 bad_query"),
            ("!GET /drop/input/any/1.2.3.4?modify=delete&expire=5", "400 bad_query"),
            ("!PUT /drop/input/any/1.2.3.4?modify=insert", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?expire", "400 bad_expire"),
            ("PUT /drop/input/any/1.2.3.4?expire=1w", "400 bad_expire"),
            ("PUT /drop/input/any/1.2.3.4?expire=1&expire=1", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?wait=false", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?wait=true&", "400 bad_query"),
            ("PUT /drop/input/any/1.2.3.4?Expire=1", "400 bad_query"),
            ("DELETE /drop/input/any/1.2.3.4?expire=1", "400 bad_query"),
        ];
        for (line, error) in table {
            assert_eq!(read(line), error, "{line}");
        }
    }

    #[test]
    fn help_depends_on_the_configuration() {
        let grammar = Grammar { default_expire: 0, non_restful: false, sets: false, ipv6: true };
        let text = help("127.0.0.1:7390", grammar);
        assert!(
            text.starts_with(concat!("rfw ", env!("CARGO_PKG_VERSION"), " at 127.0.0.1:7390\n")),
            "{text}"
        );
        assert!(text.contains("; default: permanent\n") && !text.contains("?modify"), "{text}");
        assert!(text.contains("\nGET    /list"), "{text}");
        let text =
            help("", Grammar { default_expire: 90, non_restful: true, sets: false, ipv6: true });
        assert!(text.contains("; default: 90 s\n"), "{text}");
        assert!(text.contains("\nGET    the same path?modify=insert or delete"), "{text}");
    }

    #[test]
    fn requests_that_modify() {
        let table = [("/", false), ("/modify=", false), ("/?x", false), ("/?x&modify=", true)];
        for (target, change) in table {
            let head = format!("GET {target} HTTP/1.0\r\n\r\n");
            assert_eq!(modifies(&Request::parse(head.as_bytes()).unwrap()), change, "{target}");
        }
    }

    #[test]
    fn responses() {
        let rule: Rule = "/drop/forward/eth0/1.2.3.0/24".parse().unwrap();
        let mut tally = Tally::default();
        tally.add(Verdict::Refreshed, 1);
        tally.add(Verdict::Refreshed, 1);
        let outcome = Outcome { tally: tally.clone(), expires: Some(9) };
        assert_eq!(
            outcome_json(&rule, Tag::NONE, &outcome),
            r#"{"result":"refreshed","rule":{"chain":"FORWARD","target":"DROP","inp":"eth0","out":"*","source":"1.2.3.0/24","destination":"0.0.0.0/0"},"expires":9,"tag":null}
"#
        );
        let whitelisted = vec!["::1".into(), "a\"".into()];
        let mut report = ListReport { whitelisted_count: 21, whitelisted, ..Default::default() };
        assert_eq!(
            tally_json(Action::Put(0), &tally, &report),
            r#"{"result":"applied","inserted":0,"refreshed":2,"exists":0,"deleted":0,"whitelisted_count":21,"whitelisted":["::1","a\""]}
"#
        );
        assert_eq!(
            tally_json(Action::Delete, &tally, &ListReport::default()),
            r#"{"result":"applied","deleted":0,"absent":0,"whitelisted_count":0,"whitelisted":[]}
"#
        );
        let lines = vec![(2, RuleError::NoIface("\"".into()))];
        report.invalid = Some(Invalid { count: 3, entries: 9, lines });
        report.ipv6_skipped = 7;
        let json = tally_json(Action::Delete, &tally, &report);
        assert!(json.contains(r#","ipv6_skipped":7,"wrong_count":3,"whitelisted_count":21,"#));
        let end = r#"],"wrong":[{"line":2,"message":"The path names no interface; write any for every interface, as in \"."}]}
"#;
        assert!(json.ends_with(end), "{json}");
        assert_eq!(with_note("{\"a\":{}}\n", "\""), "{\"a\":{},\"note\":\"\\\"\"}\n");
        let rule = Rule { tag: Tag::parse("a.b").unwrap(), ..rule };
        let mut tagged = TaggedRule::new(KernelRule::plain(rule), None);
        tagged.counters = Some((5, 7));
        assert_eq!(
            listed_json(3, &tagged),
            r#"{"chain":"FORWARD","num":"3","pkts":"5","bytes":"7","target":"DROP","prot":"all","opt":"--","inp":"eth0","out":"*","source":"1.2.3.0/24","destination":"0.0.0.0/0","extra":"","expires":null,"tag":"a.b"}"#
        );
    }
}
