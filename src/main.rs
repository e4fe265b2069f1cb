//! Start-up, in order, top to bottom; then the threads.

use rfw::api::Grammar;
use rfw::client;
use rfw::clock;
use rfw::config::{Config, Named, Outward};
use rfw::file::{self, Access};
use rfw::firewall::ipset::{DEFAULT_PATH, Ipset};
use rfw::firewall::iptables::{Iptables, restore_beside};
use rfw::firewall::lock::InstanceLock;
use rfw::firewall::prerequisites;
use rfw::firewall::process::Programs;
use rfw::firewall::start::StartError;
use rfw::firewall::{Firewall, Tools};
use rfw::host;
use rfw::http::auth::{LoginThrottle, Users};
use rfw::http::certificate::expiry_notice;
use rfw::http::tls::{Acceptor, Part};
use rfw::log::{Level, Log};
use rfw::metrics::Metrics;
use rfw::nearest;
use rfw::notify;
use rfw::rule::net::Family;
use rfw::rule::whitelist::{LineError, Whitelist};
use rfw::server::Server;
use rfw::server::connection::{LISTINGS, UPLOADS};
use rfw::server::limiter::ConnectionLimiter;
use rfw::server::listener::Listener;
use rfw::state::StateFile;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const SECONDS_PER_DAY: u32 = 86_400;
const USAGE: &str = "\
usage: rfw [-f FILE] [--loglevel LEVEL] [--logfile FILE] [-v] [-t] [-V] [-h]
       rfw client ...    the client, also called rfwc; rfw client -h shows how

A REST server that blocks and allows IP addresses in iptables.

  -f FILE           configuration, default /etc/rfw/rfw.conf
  --loglevel LEVEL  DEBUG, INFO (default), WARNING, ERROR or CRITICAL
  --logfile FILE    default /var/log/rfw.log; - is standard error only
  -v                everything on standard error too
  -t                check the configuration and what it names, and exit
  -V, --version     print the version
  -h, --help        print this
";

fn main() -> ExitCode {
    let args = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let mut args = args.peekable();
    let program = args.next().unwrap_or_default();
    let is_client = Path::new(&program).file_name().is_some_and(|name| name == "rfwc");
    if is_client || args.next_if(|arg| arg == "client").is_some() {
        return client::main(args);
    }
    let options = match Options::parse(args) {
        Ok(options) => options,
        Err(message) => {
            let _ = write!(io::stderr(), "rfw: {message}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let output = match options.ask {
        Ask::Help => Ok(USAGE.into()),
        Ask::Version => Ok(format!("rfw {VERSION}\n")),
        Ask::Check => check(&options.file),
        Ask::Run => run(&options).map(|never| match never {}),
    };
    match output.and_then(|text| print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(io::stderr(), "rfw: {message}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> Result<(), String> {
    let mut out = io::stdout();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| format!("cannot write to standard output: {error}"))
}

enum Ask {
    Run,
    Check,
    Help,
    Version,
}

struct Options {
    ask: Ask,
    file: PathBuf,
    level: Level,
    logfile: PathBuf,
    verbose: bool,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
        let (file, logfile) = ("/etc/rfw/rfw.conf".into(), "/var/log/rfw.log".into());
        let mut options =
            Options { ask: Ask::Run, file, level: Level::Info, logfile, verbose: false };
        while let Some(arg) = args.next() {
            let (name, joined) = Options::split(&arg);
            let mut value = || {
                let value = joined.map(String::from).or_else(|| args.next());
                value.filter(|value| !value.is_empty()).ok_or(format!("{name} needs a value"))
            };
            match name {
                "-f" => options.file = value()?.into(),
                "--logfile" => options.logfile = value()?.into(),
                "--loglevel" => {
                    let level = value()?;
                    let wrong =
                        format!("{name} {level}: write DEBUG, INFO, WARNING, ERROR or CRITICAL");
                    options.level = Level::parse(&level).ok_or(wrong)?;
                }
                "-v" => options.verbose = true,
                "-t" => options.ask = Ask::Check,
                "-V" | "--version" => return Ok(Options { ask: Ask::Version, ..options }),
                "-h" | "--help" => return Ok(Options { ask: Ask::Help, ..options }),
                _ if !arg.starts_with('-') => return Err(format!("unexpected argument {arg}")),
                _ => {
                    let hint = nearest::option_hint(name, USAGE);
                    return Err(format!("unknown option {arg}{hint}"));
                }
            }
        }
        Ok(options)
    }

    /// An option that takes a value, and the value if it is joined to it: `--logfile=FILE`, `-fFILE`.
    fn split(arg: &str) -> (&str, Option<&str>) {
        if let Some(file) = arg.strip_prefix("-f").filter(|file| !file.is_empty()) {
            return ("-f", Some(file));
        }
        match arg.split_once('=') {
            Some((name @ ("--logfile" | "--loglevel"), value)) => (name, Some(value)),
            _ => (arg, None),
        }
    }
}

/// What `-t` prints.
fn check(file: &Path) -> Result<String, String> {
    let (config, _, users, acceptor) = load(file)?;
    let warnings = config.warnings.iter();
    let mut text: String = warnings.map(|line| format!("WARNING: {}\n", at(file, line))).collect();
    let notice = certificate_notice(&config, acceptor.map(|acceptor| acceptor.expires));
    if let Some((level, notice)) = notice {
        text += &format!("{}: {notice}\n", level.name());
    }
    Ok(format!("{text}{}: OK\n{}", file.display(), config.summary(users.count())))
}

/// Reads rfw.conf and what it names, or says in one sentence what is wrong.
fn load(file: &Path) -> Result<(Config, Whitelist, Users, Option<Acceptor>), String> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let text = file::read_text(file, Access::Readable)?;
    let mut config = Config::parse(&text, folder).map_err(|error| at(file, &error))?;
    if config.credentials.is_some() {
        file::read(file, Access::Secret)?;
    }
    let blame = |named: &Named| {
        let line = named.line;
        move |message| at(file, &LineError { line, message })
    };
    let list = &config.whitelist;
    let text = file::read_text(&list.path, Access::Readable).map_err(blame(list))?;
    let whitelist = Whitelist::parse(&text).map_err(|error| at(&list.path, &error))?;
    let mut users = Users::new(config.credentials.take());
    if let Some(named) = &config.users {
        let text = file::read_text(&named.path, Access::Secret).map_err(blame(named))?;
        users.add(&text).map_err(|error| at(&named.path, &error))?;
    }
    let acceptor = match &config.outward {
        None => None,
        Some(Outward { certfile, keyfile, clientca, tls12, .. }) => {
            let chain = file::read(&certfile.path, Access::Readable).map_err(blame(certfile))?;
            let key = file::read(&keyfile.path, Access::Secret).map_err(blame(keyfile))?;
            let read = |ca: &Named| file::read(&ca.path, Access::Readable).map_err(blame(ca));
            let ca = clientca.as_ref().map(read).transpose()?;
            let acceptor = Acceptor::new(&chain, &key, ca.as_deref(), *tls12);
            let acceptor = acceptor.map_err(|(part, why)| {
                let file = match part {
                    Part::Chain => certfile,
                    Part::Key => keyfile,
                    Part::ClientCa => clientca.as_ref().unwrap_or(certfile),
                };
                blame(file)(format!("{} {why}", file.path.display()))
            });
            Some(acceptor?)
        }
    };
    for program in [&mut config.iptables, &mut config.ip6tables] {
        program.path = find(&program.path);
    }
    check_tables(&config.iptables.path).map_err(blame(&config.iptables))?;
    if config.ip6tables.line > 0 {
        check_tables(&config.ip6tables.path).map_err(blame(&config.ip6tables))?;
    }
    let sets = config.ipset.is_some();
    let check = |family, iptables: &Named| {
        prerequisites::check(&iptables.path, family, sets).map_err(blame(iptables))
    };
    check(Family::V4, &config.iptables)?;
    if check_ipv6(&config.ip6tables.path).is_ok() {
        check(Family::V6, &config.ip6tables)?;
    }
    if let Some(state) = &config.state {
        StateFile::check(&state.path).map_err(|error| blame(state)(at(&state.path, &error)))?;
    }
    if let Some(ipset) = &config.ipset {
        check_program(&ipset.path).map_err(blame(ipset))?;
    }
    Ok((config, whitelist, users, acceptor))
}

/// Starts, and stays; or says in one sentence why not.
fn run(options: &Options) -> Result<Infallible, String> {
    let (config, whitelist, users, acceptor) = load(&options.file)?;
    let (log, in_file) =
        open_log(options).map_err(|error| format!("cannot start the log: {error}"))?;
    for warning in &config.warnings {
        log.warning(format_args!("{}", at(&options.file, warning)));
    }
    let (log, whitelist) = (Arc::new(log), Arc::new(whitelist));
    let guarded = config.outward.as_ref().map(|outward| outward.port);
    let lock = InstanceLock::take(Duration::from_secs(15), || {
        let waiting =
            "another rfw, or a program that a killed one started, still runs; waiting up to 15 s";
        log.warning(format_args!("{waiting}"));
        if in_file {
            tell(waiting.into());
        }
    })?;
    let programs = Arc::new(Programs::new(lock));
    let mut iptables =
        vec![Iptables::new(Family::V4, config.iptables.path.clone(), programs.clone())];
    match check_ipv6(&config.ip6tables.path) {
        Ok(()) => {
            let ip6tables = config.ip6tables.path.clone();
            iptables.push(Iptables::new(Family::V6, ip6tables, programs.clone()));
        }
        Err(reason) => log.warning(format_args!("IPv6 rules are not accepted: {reason}")),
    }
    let path = config.ipset.as_ref().map_or(DEFAULT_PATH.into(), |ipset| ipset.path.clone());
    let ipv6 = iptables.iter().any(|iptables| iptables.family == Family::V6);
    let tools = Tools::new(iptables, Ipset::new(path, programs));
    let mut metrics = Metrics::default();
    metrics.certificate_expires = acceptor.as_ref().map(|acceptor| acceptor.expires);
    let metrics = Arc::new(metrics);
    let listeners = Listener::open(&config, acceptor)?;
    let sets = config.ipset.as_ref().map(|_| config.maxelem);
    let in_state = |error| match &config.state {
        Some(state) => at(&state.path, &error),
        None => error.message,
    };
    let state = config.state.as_ref().map(|state| StateFile::open(&state.path));
    let state = state.transpose().map_err(in_state)?;
    let told = log.clone();
    let firewall = Firewall::start(tools, state, sets, guarded, &whitelist, told, metrics.clone());
    let firewall = firewall.map_err(|error| match error {
        StartError::Message(message) => message,
        StartError::State(error) => in_state(error),
    })?;
    if let Err(error) = host::list_addresses() {
        log.warning(format_args!(
            "only white.list protects this host's own addresses from blocks and lists: {error}"
        ));
    }
    let addresses = listeners.iter().map(Listener::url).collect::<Vec<_>>().join(", ");
    log.info(format_args!("rfw {VERSION} at {addresses}"));
    if in_file && io::stderr().is_terminal() {
        tell(format!("listening at {addresses}, logging to {}", options.logfile.display()));
    }
    let Config { default_expire, non_restful, .. } = config;
    let grammar = Grammar { default_expire, non_restful, sets: sets.is_some(), ipv6 };
    let server = Server {
        firewall,
        whitelist,
        log,
        metrics,
        grammar,
        users,
        throttle: LoginThrottle::default(),
        uploads: ConnectionLimiter::new(UPLOADS),
        listings: ConnectionLimiter::new(LISTINGS),
        reading: Mutex::default(),
        addresses,
    };
    let server = Arc::new(server);
    for listener in listeners {
        let server = server.clone();
        thread::spawn(move || listener.listen(server));
    }
    notify::ready(&server.log);
    tick(&server, &config)
}

fn tick(server: &Server, config: &Config) -> ! {
    loop {
        let expires = server.metrics.certificate_expires;
        if let Some((level, notice)) = certificate_notice(config, expires) {
            server.log.write(level, format_args!("{notice}"));
        }
        for _ in 0..SECONDS_PER_DAY {
            thread::sleep(Duration::from_secs(1));
            server.firewall.tick();
            server.log.tick(Instant::now());
        }
    }
}

/// What `-t`, the start and each day's check say of the certificate's expiry.
fn certificate_notice(config: &Config, expires: Option<Duration>) -> Option<(Level, String)> {
    expiry_notice(&config.outward.as_ref()?.certfile.path, expires?, clock::wall())
}

fn at(file: &Path, LineError { line, message }: &LineError) -> String {
    match line {
        0 => format!("{}: {message}", file.display()),
        _ => format!("{}:{line}: {message}", file.display()),
    }
}

/// Where a program is that rfw.conf names. PATH belongs to whoever starts rfw, so it does not count.
fn find(program: &Path) -> PathBuf {
    let places = ["/sbin", "/usr/sbin"].map(|folder| Path::new(folder).join(program));
    places.iter().find(|path| path.exists()).unwrap_or(&places[0]).clone()
}

fn check_tables(iptables: &Path) -> Result<(), String> {
    check_program(iptables).and_then(|()| check_program(&restore_beside(iptables)))
}

/// Whether this host has IPv6 to filter. A kernel without it has no such file in /proc.
fn check_ipv6(ip6tables: &Path) -> Result<(), String> {
    if Path::new("/proc/self/net/dev").exists() && !Path::new("/proc/self/net/if_inet6").exists() {
        return Err("this host has no IPv6".into());
    }
    check_tables(ip6tables)
}

/// Looks whether a file is a program; the start shows whether it works.
fn check_program(program: &Path) -> Result<(), String> {
    let name = program.display();
    let data = fs::metadata(program)
        .map_err(|error| format!("{name}: {error}; install it, or correct its path"))?;
    match data.is_file() && data.mode() & 0o111 != 0 {
        true => Ok(()),
        false => Err(format!("{name} is not an executable file; correct its path")),
    }
}

/// Writes to standard error from a thread of its own: a terminal can be stopped (Ctrl-S).
fn tell(text: String) {
    thread::spawn(move || writeln!(io::stderr(), "rfw: {text}"));
}

/// The log, and whether only its file has it. One that cannot be opened does not stop the firewall.
fn open_log(options: &Options) -> io::Result<(Log, bool)> {
    let mut log = Log::default();
    let name = options.logfile.as_path();
    // To open a FIFO that nobody reads waits for a reader, unless it is opened for reading, too.
    let open = || File::options().read(true).append(true).create(true).mode(0o640).open(name);
    let file = (name != Path::new("-")).then(open);
    let in_file = !options.verbose && matches!(file, Some(Ok(_)));
    if !in_file {
        log.add(stderr()?, if options.verbose { Level::Debug } else { options.level })?;
    }
    match file {
        Some(Ok(file)) => log.add(file, options.level)?,
        Some(Err(error)) => log.warning(format_args!("cannot write {}: {error}", name.display())),
        None => {}
    }
    Ok((log, in_file))
}

/// Standard error without the lock of [`io::stderr`], which a blocked writer would hold.
fn stderr() -> io::Result<File> {
    io::stderr().as_fd().try_clone_to_owned().map(File::from)
}
