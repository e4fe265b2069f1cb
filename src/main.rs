//! Start-up, in order, top to bottom; then the threads.

use rfw::api::Grammar;
use rfw::config::{Config, Outward};
use rfw::firewall::Firewall;
use rfw::firewall::kernel::Tools;
use rfw::http::tls::Acceptor;
use rfw::log::{Level, Log};
use rfw::rule::net::Family;
use rfw::rule::whitelist::Whitelist;
use rfw::server::{Door, Server};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const USAGE: &str = "\
usage: rfw [-f FILE] [--loglevel LEVEL] [--logfile FILE] [-v] [-t] [-V] [-h]

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
    let args: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into()).collect();
    match Options::parse(&args) {
        Err(message) => {
            eprint!("rfw: {message}\n\n{USAGE}");
            ExitCode::from(2)
        }
        Ok(Ask::Help) => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Ask::Version) => {
            println!("rfw {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Ask::Run(options)) => match run(&options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("rfw: {message}");
                ExitCode::FAILURE
            }
        },
    }
}

/// What the command line asks for.
enum Ask {
    Help,
    Version,
    Run(Options),
}

struct Options {
    file: PathBuf,
    level: Level,
    logfile: PathBuf,
    verbose: bool,
    test: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Ask, String> {
        let mut options = Options {
            file: "/etc/rfw/rfw.conf".into(),
            level: Level::Info,
            logfile: "/var/log/rfw.log".into(),
            verbose: false,
            test: false,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "-f" => options.file = value()?.into(),
                "--logfile" => options.logfile = value()?.into(),
                "--loglevel" => {
                    let name = value()?;
                    let wrong = || {
                        format!("--loglevel {name}: write DEBUG, INFO, WARNING, ERROR or CRITICAL")
                    };
                    options.level = Level::parse(name).ok_or_else(wrong)?;
                }
                "-v" => options.verbose = true,
                "-t" => options.test = true,
                "-V" | "--version" => return Ok(Ask::Version),
                "-h" | "--help" => return Ok(Ask::Help),
                _ => return Err(format!("unknown option {arg}")),
            }
        }
        Ok(Ask::Run(options))
    }
}

/// Starts, or says in one sentence why not. With `-t` it returns in the end.
fn run(options: &Options) -> Result<(), String> {
    let file = &options.file;
    let folder = file.parent().unwrap_or(Path::new("."));
    let config =
        Config::parse(&read_text(file)?, folder).map_err(|e| at(file, e.line, &e.message))?;
    let list = &config.whitelist;
    let whitelist =
        Whitelist::parse(&read_text(list)?).map_err(|e| at(list, e.line, &e.message))?;
    let whitelist = Arc::new(whitelist);
    let acceptor = config.outward.as_ref().map(load_keys).transpose()?;
    check_program(&config.iptables, "iptables.path")?;
    let tools = [
        Tools::new(Family::V4, config.iptables.clone()),
        Tools::new(Family::V6, config.ip6tables.clone()),
    ];
    if options.test {
        println!("{} and what it names are in order", file.display());
        return Ok(());
    }
    let log = Arc::new(open_log(options));
    let guarded = config.outward.as_ref().map(|outward| outward.port);
    let doors = Door::open(&config, acceptor)?;
    let firewall = Firewall::start(tools, guarded, whitelist.clone(), log.clone())?;
    let grammar =
        Grammar { default_expire: config.default_expire, non_restful: config.non_restful };
    let addresses = doors.iter().map(Door::url).collect::<Vec<_>>().join(", ");
    log.info(format_args!("rfw {} at {addresses}", env!("CARGO_PKG_VERSION")));
    let credentials = config.credentials;
    let server = Arc::new(Server { firewall, whitelist, log, grammar, credentials, addresses });
    for door in doors {
        let server = server.clone();
        thread::spawn(move || server.listen(door));
    }
    loop {
        thread::sleep(Duration::from_secs(1));
        server.firewall.tick();
    }
}

fn at(file: &Path, line: usize, message: &str) -> String {
    match line {
        0 => format!("{}: {message}", file.display()),
        _ => format!("{}:{line}: {message}", file.display()),
    }
}

/// Reads a file that decides who may do what: nobody but root and its owner
/// may be able to write it.
fn read_trusted(file: &Path) -> Result<Vec<u8>, String> {
    let wrong = |error: std::io::Error| at(file, 0, &format!("cannot read it: {error}"));
    let mode = fs::metadata(file).map_err(wrong)?.mode();
    if mode & 0o022 != 0 {
        return Err(at(file, 0, "others than its owner may write it; run chmod go-w on it"));
    }
    fs::read(file).map_err(wrong)
}

fn read_text(file: &Path) -> Result<String, String> {
    String::from_utf8(read_trusted(file)?).map_err(|_| at(file, 0, "it is not UTF-8 text"))
}

fn load_keys(outward: &Outward) -> Result<Acceptor, String> {
    let chain = read_trusted(&outward.certfile)?;
    let key = read_trusted(&outward.keyfile)?;
    Acceptor::new(&chain, &key, outward.tls12).map_err(|message| {
        format!("{}, {}: {message}", outward.certfile.display(), outward.keyfile.display())
    })
}

/// The program and `-restore` beside it, as far as a look at the files tells.
fn check_program(iptables: &Path, key: &str) -> Result<(), String> {
    let mut restore = iptables.as_os_str().to_owned();
    restore.push("-restore");
    for program in [iptables, Path::new(&restore)] {
        let mode = fs::metadata(program).map_err(|error| {
            format!("{}: {error}; install iptables or set {key}", program.display())
        })?;
        if !mode.is_file() || mode.mode() & 0o111 == 0 {
            return Err(format!("{} is no program; set {key}", program.display()));
        }
    }
    Ok(())
}

/// A log file that cannot be opened does not stop the firewall.
fn open_log(options: &Options) -> Log {
    let verbose = options.verbose.then_some(Level::Debug);
    if options.logfile == Path::new("-") {
        return Log { file: None, stderr: verbose.or(Some(options.level)) };
    }
    let file = File::options().append(true).create(true).mode(0o640).open(&options.logfile);
    match file {
        Ok(file) => Log { file: Some((file, options.level)), stderr: verbose },
        Err(error) => {
            let log = Log { file: None, stderr: verbose.or(Some(options.level)) };
            let file = options.logfile.display();
            log.warning(format_args!("cannot write {file}: {error}; the log is here instead"));
            log
        }
    }
}
