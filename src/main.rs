//! The program: the command line, then the start from top to bottom, then the threads.

use rfw::api::Grammar;
use rfw::client;
use rfw::clock;
use rfw::config::{Config, Named};
use rfw::firewall::ipset::{DEFAULT_PATH, Ipset};
use rfw::firewall::iptables::Iptables;
use rfw::firewall::lock::InstanceLock;
use rfw::firewall::process::Programs;
use rfw::firewall::{Firewall, Tools};
use rfw::host;
use rfw::http::auth::LoginThrottle;
use rfw::http::certificate::expiry_notice;
use rfw::log::{Level, Log};
use rfw::metrics::Metrics;
use rfw::nearest;
use rfw::notify;
use rfw::rule::net::Family;
use rfw::rule::whitelist::Whitelist;
use rfw::server::Server;
use rfw::server::connection::{LISTINGS, READING, UPLOADS};
use rfw::server::limiter::ConnectionLimiter;
use rfw::server::listener::Listener;
use rfw::setup::{Setup, check_start};
use rfw::state::StateFile;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const SECONDS_PER_DAY: u32 = 86_400;
/// How long rfw waits for another instance to end; the message of [`take_lock`] names it, too.
const LOCK_LIMIT: Duration = Duration::from_secs(15);
const USAGE: &str = "\
usage: rfw [-f FILE] [--loglevel LEVEL] [--logfile FILE] [-v] [-t] [-V] [-h]
       rfw client ...    the client, also called rfwc; see rfw client -h

A REST server that blocks and allows IP addresses in iptables.

  -f FILE           configuration file, default /etc/rfw/rfw.conf
  --loglevel LEVEL  DEBUG, INFO (default), WARNING, ERROR or CRITICAL
  --logfile FILE    log file, default /var/log/rfw.log; - for standard error only
  -v                also log everything to standard error
  -t                check the configuration and everything it names, and exit
  -V, --version     print the version
  -h, --help        print this help
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
    let output = match options.mode {
        Mode::Help => Ok(USAGE.into()),
        Mode::Version => Ok(format!("rfw {VERSION}\n")),
        Mode::Check => check(&options.file),
        Mode::Run => run(&options).map(|never| match never {}),
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

enum Mode {
    Run,
    Check,
    Help,
    Version,
}

struct Options {
    mode: Mode,
    file: PathBuf,
    level: Level,
    logfile: PathBuf,
    verbose: bool,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
        let (file, logfile) = ("/etc/rfw/rfw.conf".into(), "/var/log/rfw.log".into());
        let mut options =
            Options { mode: Mode::Run, file, level: Level::Info, logfile, verbose: false };
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
                    let message =
                        format!("{name} {level}: write DEBUG, INFO, WARNING, ERROR or CRITICAL");
                    options.level = Level::parse(&level).ok_or(message)?;
                }
                "-v" => options.verbose = true,
                "-t" => options.mode = Mode::Check,
                "-V" | "--version" => return Ok(Options { mode: Mode::Version, ..options }),
                "-h" | "--help" => return Ok(Options { mode: Mode::Help, ..options }),
                _ if !arg.starts_with('-') => return Err(format!("unexpected argument {arg}")),
                _ => {
                    let hint = nearest::option_hint(name, USAGE);
                    return Err(format!("unknown option {arg}{hint}"));
                }
            }
        }
        Ok(options)
    }

    /// Splits an option from a value that is joined to it: `--logfile=FILE`, `-fFILE`.
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

/// Checks the configuration and returns the output of `-t`.
fn check(file: &Path) -> Result<String, String> {
    let Setup { config, users, acceptor, ipv6, warnings, .. } = Setup::load(file)?;
    check_start(file, &config, ipv6)?;
    let mut text: String = warnings.iter().map(|line| format!("WARNING: {line}\n")).collect();
    let notice = certificate_notice(&config, acceptor.map(|acceptor| acceptor.expires));
    if let Some((level, notice)) = notice {
        text += &format!("{}: {notice}\n", level.name());
    }
    Ok(format!("{text}{}: OK\n{}", file.display(), config.summary(users.count(), ipv6)))
}

/// Starts rfw and runs until it is killed. The error is a sentence.
fn run(options: &Options) -> Result<Infallible, String> {
    let Setup { config, whitelist, users, acceptor, ipv6, warnings } = Setup::load(&options.file)?;
    let opened = open_log(options);
    let (log, file_only) = opened.map_err(|error| format!("cannot start the log: {error}"))?;
    for warning in warnings {
        log.warning(format_args!("{warning}"));
    }
    let log = Arc::new(log);
    let lock = take_lock(&log, file_only)?;
    let tools = open_tools(&config, lock, ipv6);
    let mut metrics = Metrics::default();
    metrics.certificate_expires = acceptor.as_ref().map(|acceptor| acceptor.expires);
    let metrics = Arc::new(metrics);
    let listeners = Listener::open(&config, acceptor)?;
    let firewall = start_firewall(&config, tools, &whitelist, &log, &metrics);
    let explain = |error| check_start(&options.file, &config, ipv6).err().unwrap_or(error);
    let firewall = firewall.map_err(explain)?;
    // Logs a WARNING if the kernel does not list them: at start, not only at the first change.
    host::list_addresses(&log);
    let addresses = listeners.iter().map(Listener::url).collect::<Vec<_>>().join(", ");
    log.info(format_args!("rfw {VERSION} at {addresses}"));
    if file_only && io::stderr().is_terminal() {
        print_notice(format!("listening at {addresses}, logging to {}", options.logfile.display()));
    }
    let Config { default_expire, non_restful, .. } = config;
    let grammar = Grammar { default_expire, non_restful, sets: config.ipset.is_some(), ipv6 };
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
        reading: ConnectionLimiter::new(READING),
        addresses,
    };
    let server = Arc::new(server);
    for listener in listeners {
        let started = listener.start(server.clone());
        started.map_err(|error| format!("cannot start a thread: {error}"))?;
    }
    notify::ready(&server.log);
    tick(&server, &config)
}

fn take_lock(log: &Log, file_only: bool) -> Result<InstanceLock, String> {
    InstanceLock::take(LOCK_LIMIT, || {
        let waiting = "another rfw is still running, or a program that a killed rfw started; \
                       waiting up to 15 s";
        log.warning(format_args!("{waiting}"));
        if file_only {
            print_notice(waiting.into());
        }
    })
}

fn open_tools(config: &Config, lock: InstanceLock, ipv6: bool) -> Tools {
    let programs = Arc::new(Programs::new(lock));
    let iptables =
        |family, named: &Named| Iptables::new(family, named.path.clone(), programs.clone());
    let mut families = vec![iptables(Family::V4, &config.iptables)];
    families.extend(ipv6.then(|| iptables(Family::V6, &config.ip6tables)));
    let path = config.ipset.as_ref().map_or(DEFAULT_PATH.into(), |ipset| ipset.path.clone());
    Tools { iptables: families, ipset: Ipset::new(path, programs) }
}

fn start_firewall(
    config: &Config,
    tools: Tools,
    whitelist: &Whitelist,
    log: &Arc<Log>,
    metrics: &Arc<Metrics>,
) -> Result<Firewall, String> {
    let open = |named: &Named| StateFile::open(&named.path).map_err(|error| error.at(&named.path));
    let state = config.state.as_ref().map(open).transpose()?;
    let sets = config.ipset.as_ref().map(|_| config.maxelem);
    let guarded = config.outward.as_ref().map(|outward| outward.port);
    let (log, metrics) = (log.clone(), metrics.clone());
    Firewall::start(tools, state, sets, guarded, whitelist, log, metrics)
}

fn tick(server: &Arc<Server>, config: &Config) -> ! {
    // Neither a client nor an expiry should wait for it. Without a thread, there is no report.
    let shared = server.clone();
    let report = move || shared.firewall.report_leftovers(&shared.log);
    let _ = thread::Builder::new().name("leftovers".into()).spawn(report);
    let expires = server.metrics.certificate_expires;
    let mut pause = Duration::from_secs(1);
    loop {
        if let Some((level, notice)) = certificate_notice(config, expires) {
            server.log.write(level, format_args!("{notice}"));
        }
        for _ in 0..SECONDS_PER_DAY {
            thread::sleep(pause);
            pause = server.firewall.tick();
            server.log.tick(Instant::now());
        }
    }
}

/// A notice if the certificate expires soon: for `-t`, the start and the daily check.
fn certificate_notice(config: &Config, expires: Option<Duration>) -> Option<(Level, String)> {
    expiry_notice(&config.outward.as_ref()?.certfile.path, expires?, clock::wall())
}

/// Writes to standard error from its own thread, because a stopped terminal (Ctrl-S) blocks.
fn print_notice(text: String) {
    let _ = thread::Builder::new().spawn(move || writeln!(io::stderr(), "rfw: {text}"));
}

/// Opens the log and returns whether it goes only to a file. If the file cannot be opened, rfw
/// starts all the same.
fn open_log(options: &Options) -> io::Result<(Log, bool)> {
    let mut log = Log::default();
    let name = options.logfile.as_path();
    // Opening a FIFO for writing waits for a reader, unless it is opened for reading, too.
    let open = || File::options().read(true).append(true).create(true).mode(0o640).open(name);
    let file = (name != Path::new("-")).then(open);
    let file_only = !options.verbose && matches!(file, Some(Ok(_)));
    if !file_only {
        // Without the lock of `io::stderr`, which a blocked writer would keep.
        let stderr = io::stderr().as_fd().try_clone_to_owned()?.into();
        log.add(stderr, if options.verbose { Level::Debug } else { options.level })?;
    }
    match file {
        Some(Ok(file)) => log.add(file, options.level)?,
        Some(Err(error)) => log.warning(format_args!("cannot write {}: {error}", name.display())),
        None => {}
    }
    Ok((log, file_only))
}
