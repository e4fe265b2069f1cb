//! The state file: the list of rules on disk, which survives a reboot.
//!
//! ```text
//! file   = "rfw state 2" LF *( change / list )
//! change = ( "+" SP expires SP rule / "-" SP rule ) LF   ; Unix seconds; 0 means never
//! list   = "*" SP count LF count(change)   ; changes made together: all of them or none
//! ```
//!
//! Changes are appended and synced before the kernel is changed. A change that the kernel rejects
//! is truncated: further lines could not restore the order of rules, nor be written to a full disk.
//! A power cut leaves an incomplete tail, which was never acknowledged; some file systems fill it
//! with zeros. A rule is written as its path and tag ([`crate::rule`]); version 1 had no tags.

use crate::file::{self, Access};
use crate::rule::whitelist::LineError;
use crate::rule::{Rule, is_number};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const HEADER: &str = "rfw state 2\n";
const HEADERS: [&str; 2] = [HEADER, "rfw state 1\n"];
/// The longest line in bytes; the longest path is far shorter.
const MAX_LINE: u64 = 512;
/// How many bytes of dropped lines are reported: a file system may append megabytes of zeros.
const MAX_DROPPED: u64 = 65_536;
/// A file below this size in bytes is compacted only after a start.
const SMALL: u64 = 64 * 1024;

/// A rule, and when it expires in Unix seconds.
pub type StoredRule = (Rule, Option<u64>);

/// One line of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    Put(Rule, Option<u64>),
    Delete(Rule),
}

/// An open state file, locked against any other rfw.
pub struct StateFile {
    path: PathBuf,
    file: File,
    /// How many bytes of it are valid, and how many were before the last append.
    size: u64,
    before: u64,
    /// Whether more bytes may follow, or the new name may not be synced yet.
    needs_repair: bool,
    /// Above this size it is compacted; 0 until rfw has rewritten it once.
    limit: u64,
    /// Whether it must be replaced before anything is appended: it was opened on a read-only disk, or
    /// does not hold the list.
    pub is_outdated: bool,
}

/// The result of reading a file.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Contents {
    /// How many bytes are valid; a power cut has left the rest.
    pub size: u64,
    /// The line of an incomplete last change, and why it is dropped.
    pub tail: Option<LineError>,
    /// The first of the lines that are dropped.
    pub dropped: Vec<Vec<u8>>,
}

impl StateFile {
    /// Opens and locks a file, and creates it if necessary.
    pub fn open(path: &Path) -> Result<StateFile, LineError> {
        let failed = |error: io::Error| whole_file(format!("cannot open it: {error}"));
        check_kind(path, false)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(path);
        // The list can still be read from a read-only disk.
        let file = file.or_else(|error| match error.kind() {
            ErrorKind::ReadOnlyFilesystem => File::open(path).map_err(|_| error),
            _ => Err(error),
        });
        let file = file.map_err(failed)?;
        let locked = file.try_lock().is_ok() && is_same_file(&file, path).map_err(failed)?;
        if !locked {
            let message = "another rfw uses it; stop that one, or set state.file to another file";
            return Err(whole_file(message.into()));
        }
        // A symbolic link is kept: compaction replaces the file that it points to.
        let path = fs::canonicalize(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        // A file that is open only for reading refuses even an empty write.
        let is_outdated = (&file).write(b"").is_err();
        Ok(StateFile { path, file, size, before: size, needs_repair: false, limit: 0, is_outdated })
    }

    /// Checks that a file can be read, if it exists.
    pub fn check(path: &Path) -> Result<(), LineError> {
        check_kind(path, file::own_user() == 0)?;
        match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Ok(file) if file.metadata().is_ok_and(|data| data.len() == 0) => Ok(()),
            Ok(file) => read(&mut BufReader::new(file), |_| ()).map(|_| ()),
            Err(error) => Err(whole_file(format!("cannot open it: {error}"))),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing was ever written to it.
    pub fn is_new(&self) -> bool {
        self.size == 0
    }

    /// Passes the records of the file to `each`, in order, and truncates an incomplete tail, of
    /// which some records have been passed by then: the caller must begin again.
    pub fn replay(&mut self, each: impl FnMut(Record)) -> Result<Contents, LineError> {
        let failed = |error: io::Error| whole_file(format!("cannot read it: {error}"));
        self.file.rewind().map_err(failed)?;
        let mut contents = read(&mut BufReader::new((&self.file).take(self.size)), each)?;
        if contents.tail.is_some() {
            self.file.seek(SeekFrom::Start(contents.size)).map_err(failed)?;
            let dropped = BufReader::new((&self.file).take(MAX_DROPPED)).split(b'\n');
            contents.dropped = dropped.map_while(Result::ok).collect();
            (self.size, self.needs_repair) = (contents.size, true);
            // If that fails, the next change does it or is refused.
            let _ = self.repair_tail();
        }
        Ok(contents)
    }

    /// Writes and syncs records, all or none, also if the power is cut. The error is a sentence that
    /// says what to do.
    pub fn append(
        &mut self,
        mut records: impl Iterator<Item = Record> + Clone,
    ) -> Result<(), String> {
        self.before = self.size;
        self.check_unchanged("written")?;
        let count = records.clone().count();
        let written = self.repair_tail().and_then(|()| {
            if count == 0 {
                return Ok(());
            }
            self.needs_repair = true;
            let mut out = BufWriter::new(&self.file);
            if count > 1 {
                writeln!(out, "* {count}")?;
            }
            records.try_for_each(|record| out.write_all(line_of(&record).as_bytes()))?;
            out.into_inner().map_err(io::IntoInnerError::into_error)?;
            self.file.sync_data()?;
            (self.size, self.needs_repair) = (self.file.metadata()?.len(), false);
            Ok(())
        });
        written.map_err(|error| {
            let _ = self.repair_tail();
            self.failed("written", &error)
        })
    }

    fn failed(&self, to_be: &str, error: &io::Error) -> String {
        let path = self.path.display();
        let advice = match error.kind() {
            ErrorKind::ResourceBusy => "mount its directory instead of the file",
            _ => "make room there, or check its disk",
        };
        format!("{path} cannot be {to_be}: {error}; {advice}.")
    }

    /// Removes the records of the last append. If that fails, the next tick tries again, and changes are
    /// refused meanwhile.
    pub fn undo_append(&mut self) {
        if self.size > self.before {
            (self.size, self.needs_repair) = (self.before, true);
            let _ = self.repair_tail();
        }
    }

    /// Checks that the file is still as rfw left it, under its name.
    fn check_unchanged(&self, to_be: &str) -> Result<(), String> {
        let is_unchanged = || {
            let has_size = self.needs_repair || self.file.metadata()?.len() == self.size;
            Ok(has_size && is_same_file(&self.file, &self.path)?)
        };
        if is_unchanged().map_err(|error| self.failed(to_be, &error))? {
            return Ok(());
        }
        let path = self.path.display();
        Err(format!("another program changed or removed {path}; restart rfw."))
    }

    /// Removes what an append that failed or was undone left in the file.
    pub fn repair_tail(&mut self) -> io::Result<()> {
        if self.needs_repair {
            self.file.set_len(self.size)?;
            self.file.sync_data()?;
            File::open(directory(&self.path))?.sync_all()?;
            self.needs_repair = false;
        }
        Ok(())
    }

    /// Whether it is time to compact the file.
    pub fn is_large(&self) -> bool {
        self.size > self.limit
    }

    /// Replaces the file by one with these rules, the oldest first. The error is a sentence; the file
    /// is then unchanged, or replaced but not certain to survive a power cut.
    pub fn replace(&mut self, rules: impl Iterator<Item = StoredRule>) -> Result<(), String> {
        self.check_unchanged("compacted")?;
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        self.write_new(new.as_ref(), rules).map_err(|error| {
            let _ = fs::remove_file(&new);
            self.failed("compacted", &error)
        })
    }

    fn write_new(&mut self, new: &Path, rules: impl Iterator<Item = StoredRule>) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let _ = fs::remove_file(new);
        let file = options.read(true).append(true).create_new(true).mode(0o600).open(new)?;
        file.try_lock()?;
        let mut out = BufWriter::new(&file);
        out.write_all(HEADER.as_bytes())?;
        for (rule, expires) in rules {
            out.write_all(line_of(&Record::Put(rule, expires)).as_bytes())?;
        }
        out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        let size = file.metadata()?.len();
        fs::rename(new, &self.path)?;
        // The old file has lost its name, even if the directory cannot be synced.
        (self.file, self.size, self.needs_repair) = (file, size, true);
        (self.limit, self.is_outdated) = (size.saturating_mul(2).max(SMALL), false);
        self.repair_tail()
    }
}

fn whole_file(message: String) -> LineError {
    LineError { line: 0, message }
}

/// Checks that reading the file does not block, and who can write to it. With `of_service`, it may
/// belong to the owner of its directory, and must where systemd keeps the directories of units with
/// DynamicUser=: root checks the file of a service that runs as another user.
fn check_kind(path: &Path, of_service: bool) -> Result<(), LineError> {
    let owner = fs::metadata(directory(path)).map_or(0, |data| data.uid());
    let of_unit = || fs::canonicalize(path).is_ok_and(|path| path.starts_with("/var/lib/private"));
    match fs::metadata(path) {
        Ok(data) if !data.is_file() => Err(whole_file("it is not a regular file".into())),
        Ok(data) if of_service && data.uid() != owner && of_unit() => Err(whole_file(format!(
            "the user of the systemd unit does not own it; run chown {owner} {}",
            path.display()
        ))),
        Ok(data) if of_service && data.mode() & 0o022 == 0 && data.uid() == owner => Ok(()),
        Ok(data) => file::check(path, &data, Access::Readable).map_err(whole_file),
        Err(error) if !directory(path).is_dir() => Err(whole_file(format!(
            "its directory does not exist ({error}); create it with mkdir -m 700"
        ))),
        _ => Ok(()),
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|directory| *directory != Path::new("")).unwrap_or(Path::new("."))
}

/// Whether the locked file still has this name: someone may have replaced or deleted it.
fn is_same_file(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn line_of(record: &Record) -> String {
    match record {
        Record::Put(rule, expires) => format!("+ {} {rule}\n", expires.unwrap_or(0)),
        Record::Delete(rule) => format!("- {rule}\n"),
    }
}

/// A list that is not complete yet.
struct OpenList {
    line: usize,
    offset: u64,
    count: usize,
    seen: usize,
    /// Lines of which a part is zeros: what a power cut leaves of blocks that were not yet synced.
    damage: Option<LineError>,
}

fn read(source: &mut impl BufRead, mut each: impl FnMut(Record)) -> Result<Contents, LineError> {
    let mut contents = Contents::default();
    let mut list: Option<OpenList> = None;
    let mut bytes = Vec::new();
    for line in 1.. {
        let at = |message| LineError { line, message };
        let io_error = |error: io::Error| at(error.to_string());
        let (length, is_cut) = read_line(source, &mut bytes).map_err(io_error)?;
        if is_cut {
            let message = format!("the last line is incomplete ({length} bytes) and is dropped");
            contents.tail = (length > 0).then_some(at(message));
            break;
        }
        let text = String::from_utf8_lossy(&bytes);
        if line == 1 && HEADERS.contains(&&*text) {
            contents.size = length;
            continue;
        }
        match (parse_count(&text), parse_record(&text)) {
            (Some(count), _) if line > 1 && list.is_none() => {
                let offset = contents.size;
                list = Some(OpenList { line, offset, count, seen: 0, damage: None });
            }
            (_, Some(record)) if line > 1 => {
                each(record);
                list.iter_mut().for_each(|list| list.seen = list.seen.saturating_add(1));
            }
            _ => {
                let error = at(damage(line, &text, list.as_ref()));
                let Some(list) = list.as_mut().filter(|_| text.contains('\0')) else {
                    return Err(error);
                };
                list.damage = Some(error);
                if !bytes.ends_with(b"\n") {
                    source.skip_until(b'\n').map_err(io_error)?;
                }
            }
        }
        contents.size = contents.size.saturating_add(length);
        let complete = list.take_if(|list| list.seen >= list.count);
        // It was acknowledged, so what it lacks is lost.
        if let Some(error) = complete.and_then(|list| list.damage) {
            return Err(error);
        }
    }
    if contents.size == 0 {
        return Err(LineError { line: 1, message: "the first line must be: rfw state 2".into() });
    }
    if let Some(OpenList { line, offset, count, seen, .. }) = list {
        let message = format!(
            "the list that begins here has {seen} of its {count} changes; it was never \
             acknowledged, unless the file is damaged, and is dropped"
        );
        contents.size = offset;
        contents.tail = Some(LineError { line, message });
    }
    Ok(contents)
}

/// Reads a line. Returns how much of it was read, and whether the file ends before the line does.
fn read_line(source: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<(u64, bool)> {
    bytes.clear();
    let length = source.take(MAX_LINE).read_until(b'\n', bytes)? as u64;
    let is_cut = !bytes.ends_with(b"\n")
        && (length < MAX_LINE || bytes.ends_with(b"\0") && is_zeros(source)?);
    Ok((length, is_cut))
}

/// Whether a source has nothing but zeros to its end.
fn is_zeros(source: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let buffer = source.fill_buf()?;
        let length = buffer.len();
        if length == 0 || buffer.iter().any(|byte| *byte != 0) {
            return Ok(length == 0);
        }
        source.consume(length);
    }
}

fn damage(line: usize, text: &str, list: Option<&OpenList>) -> String {
    let text = text.trim_end_matches('\n').escape_default();
    match (line, list) {
        (1, _) => format!(
            "'{text}' is not the header of an rfw state file; set state.file to another file"
        ),
        (_, Some(list)) if text.to_string().starts_with('*') => {
            format!(
                "the list of line {} has fewer changes than it says; repair that line",
                list.line
            )
        }
        _ => format!(
            "'{text}' is not a valid line; repair it, or move the file away to begin a new one"
        ),
    }
}

fn parse_count(line: &str) -> Option<usize> {
    let count = line.strip_prefix("* ")?.strip_suffix('\n')?;
    count.parse().ok().filter(|_| is_number(count))
}

fn parse_record(line: &str) -> Option<Record> {
    let (verb, rest) = line.strip_suffix('\n')?.split_once(' ')?;
    match verb {
        "+" => {
            let (expires, path) = rest.split_once(' ')?;
            let second: u64 = expires.parse().ok().filter(|_| is_number(expires))?;
            Some(Record::Put(path.parse().ok()?, (second > 0).then_some(second)))
        }
        "-" => Some(Record::Delete(rest.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const A: &str = "/drop/input/any/1.1.1.1";
    const B: &str = "/drop/input/any/2.2.2.0/24";
    const C: &str = "/accept/forward/eth0/5::/ppp+/6::/64";
    const OLD: &str = "rfw state 1\n";

    fn put(path: &str, expires: u64) -> Record {
        Record::Put(path.parse().unwrap(), (expires > 0).then_some(expires))
    }

    fn delete(path: &str) -> Record {
        Record::Delete(path.parse().unwrap())
    }

    /// The rules that remain after records: `PATH EXPIRES`, the oldest first.
    fn live(records: &[Record]) -> String {
        let mut rules: Vec<StoredRule> = Vec::new();
        for record in records {
            let (Record::Put(rule, _) | Record::Delete(rule)) = record;
            rules.retain(|(other, _)| other != rule);
            if let Record::Put(rule, expires) = record {
                rules.push((*rule, *expires));
            }
        }
        let show = |(rule, expires): &StoredRule| {
            assert_ne!(*expires, Some(0), "0 means never");
            format!("{rule} {}", expires.unwrap_or(0))
        };
        rules.iter().map(show).collect::<Vec<_>>().join(", ")
    }

    /// The rules of a text, the bytes that are valid, and the line at which an incomplete tail
    /// begins; or the line that is damaged.
    fn parse(text: &str) -> Result<(String, u64, Option<usize>), usize> {
        let mut records = Vec::new();
        let contents = read(&mut text.as_bytes(), |record| records.push(record));
        let contents = contents.map_err(|error| error.line)?;
        let tail = contents.tail.map(|tail| tail.line);
        if tail.is_some() {
            // The caller replays again without the tail.
            records.clear();
            let valid = &text.as_bytes()[..contents.size as usize];
            read(&mut &*valid, |record| records.push(record)).map_err(|error| error.line)?;
        }
        Ok((live(&records), contents.size, tail))
    }

    #[test]
    fn files() {
        let table = [
            (String::new(), String::new()),
            (format!("+ 0 {A}\n+ 9 {B}\n"), format!("{A} 0, {B} 9")),
            (format!("+ 0 {A}\n+ 9 {B}\n+ 7 {A}\n"), format!("{B} 9, {A} 7")),
            (format!("+ 0 {A}\n- {A}\n+ 9 {C}\n- {B}\n"), format!("{C} 9")),
            (format!("* 2\n+ 0 {A}\n- {B}\n* 0\n+ 1 {C}\n"), format!("{A} 0, {C} 1")),
            (format!("* 1\n+ 0 {A}\n* 1\n+ 1 {B}\n"), format!("{A} 0, {B} 1")),
            (format!("+ {}9 {A}\n", "0".repeat(512 - 3 - 1 - A.len() - 1)), format!("{A} 9")),
        ];
        for (lines, rules) in table {
            for header in [HEADER, OLD] {
                let text = format!("{header}{lines}");
                assert_eq!(parse(&text), Ok((rules.clone(), text.len() as u64, None)), "{text}");
            }
        }
    }

    #[test]
    fn a_power_cut_at_every_byte() {
        let text = format!("{HEADER}+ 0 {A}\n* 2\n+ 0 {B}\n- {A}\n+ 9 {C}\n");
        let lines: Vec<usize> = text.match_indices('\n').map(|(at, _)| at + 1).collect();
        let (header, a, list) = (lines[0], lines[1], lines[4]);
        for end in 0..=text.len() {
            let (rules, size, line) = match end {
                // rfw writes the header to another file first.
                _ if end < header => {
                    assert_eq!(parse(&text[..end]), Err(1), "{end}");
                    continue;
                }
                _ if end == text.len() => (format!("{B} 0, {C} 9"), end, 6),
                _ if end >= list => (format!("{B} 0"), list, 6),
                // The tail begins with the list as soon as its first line is complete.
                _ if end >= a => (format!("{A} 0"), a, 3),
                _ => (String::new(), header, 2),
            };
            let tail = (size < end).then_some(line);
            assert_eq!(parse(&text[..end]), Ok((rules, size as u64, tail)), "{end}");
        }
    }

    #[test]
    fn an_incomplete_tail_is_reported() {
        let zeros = |line: &str, count| format!("{line}{}", "\0".repeat(count));
        let table = [
            ("+ 0 /dr", 2, "the last line is incomplete (7 bytes) and is dropped"),
            ("* 3\n+ 0 /drop/input/any/1.1.1.1\n", 2, "has 1 of its 3 changes; it was never"),
            ("* 3\n+ 0 /drop/input/any/1.1.1.1\n+", 2, "has 1 of its 3 changes; it was never"),
            ("* 3\n", 2, "has 0 of its 3 changes; it was never"),
            // Some file systems fill what was not written with zeros.
            (&zeros("", 511), 2, "the last line is incomplete (511 bytes)"),
            (&zeros("", 512), 2, "the last line is incomplete"),
            (&zeros("", 100_000), 2, "the last line is incomplete"),
            (&zeros("+ 0 /dr", 100_000), 2, "the last line is incomplete"),
            (&zeros("* 3\n", 100_000), 2, "has 0 of its 3 changes; it was never"),
        ];
        for (text, line, message) in table {
            let contents = read(&mut format!("{HEADER}{text}").as_bytes(), |_| ()).unwrap();
            let tail = contents.tail.unwrap();
            assert_eq!(tail.line, line, "{text}");
            assert!(tail.message.contains(message), "{}", tail.message);
        }
    }

    /// rfw did not start if a file system had written later blocks of a list first.
    #[test]
    fn a_power_cut_that_leaves_zeros_within_the_last_list() {
        let list = format!("* 40\n{}", format!("+ 0 {A}\n").repeat(40));
        let text = format!("{HEADER}- {B}\n{list}");
        let begin = text.len() - list.len() + "* 40\n".len();
        for (from, count) in (begin..text.len()).flat_map(|from| [(from, 1), (from, 600)]) {
            let mut bytes = text.clone().into_bytes();
            bytes.iter_mut().skip(from).take(count).for_each(|byte| *byte = 0);
            let mut source = BufReader::with_capacity(64, &*bytes);
            let contents = read(&mut source, |_| ()).map_err(|error| error.message).unwrap();
            let tail = contents.tail.map(|tail| tail.line);
            assert_eq!(
                (tail, contents.size),
                (Some(3), (text.len() - list.len()) as u64),
                "{from}"
            );
        }
    }

    #[test]
    fn damage() {
        let long = format!("+ {} {A}", "0".repeat(512 - 3 - A.len()));
        let longest = format!("+ 0 {}", "x".repeat(600));
        let table = [
            "x",
            "",
            "+ 0 /drop/input/any",
            "+ /drop/input/any/1.1.1.1",
            "- 0 /drop/input/any/1.1.1.1",
            "+ +1 /drop/input/any/1.1.1.1",
            "+ 0 /drop/input/any/1.1.1.1 ",
            "+  0 /drop/input/any/1.1.1.1",
            "+ 0 /drop/input/any/1.1.1.1\r",
            "+ 18446744073709551616 /drop/input/any/1.1.1.1",
            "* x",
            "* +1",
            "* -1",
            "*",
            "\0\0\0",
            "rfw state 2",
            "* 2\n* 1",
            // The number of a list was damaged, or a line of it was lost.
            "* 9\n+ 0 /drop/input/any/1.1.1.1\n+ 0 /drop/input/any/2.2.2.2\n* 1",
            "* 3\n+ 0 /drop/input/any/1.1.1.1\nx",
            "* 2\n+ 0 /drop/input/any/1.1.1.1\n\0\0",
            &long,
            &longest,
            &"\0".repeat(100_000),
        ];
        for line in table {
            let damaged = 2 + line.matches('\n').count();
            let text = format!("{HEADER}{line}\n+ 0 {A}\n");
            assert_eq!(parse(&text), Err(damaged), "{line:?}");
        }
        let firsts = ["rfw state 3\n", "rfw state 2\r\n", "+ 0 /drop/input/any/1.1.1.1\n", "* 1\n"];
        for first in firsts {
            assert_eq!(parse(&format!("{first}+ 0 {A}\n")), Err(1), "{first:?}");
        }
    }

    #[test]
    fn damage_says_what_to_do() {
        let table = [
            ("#!/bin/sh\n", "'#!/bin/sh' is not the header of an rfw state file; set state.file"),
            ("rfw", "the first line must be: rfw state 2"),
            ("rfw state 2\n+ 0 \t\n", "'+ 0 \\t' is not a valid line; repair it"),
            ("rfw state 2\n* 9\n+ 0 x\n", "'+ 0 x' is not a valid line; repair it"),
            ("rfw state 2\n*9\n", "'*9' is not a valid line; repair it"),
            (
                "rfw state 2\n+ 0 /drop/input/any/1.1.1.1\n* 2\n- /drop/input/any/1.1.1.1\n* 1\n",
                "the list of line 3 has fewer changes than it says; repair that line",
            ),
        ];
        for (text, message) in table {
            let error = read(&mut text.as_bytes(), |_| ()).unwrap_err();
            assert!(error.message.contains(message), "{}", error.message);
        }
    }

    /// A separate directory for each test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let id = std::process::id();
            let directory = std::env::temp_dir().join(format!("rfw-state-{id}-{name}"));
            fs::create_dir_all(&directory).unwrap();
            Directory(directory)
        }

        fn file(&self, text: &str) -> PathBuf {
            let path = self.0.join("state");
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            path
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn replay(state: &mut StateFile) -> (String, Contents) {
        let mut records = Vec::new();
        let contents = state.replay(|record| records.push(record)).unwrap();
        (live(&records), contents)
    }

    #[test]
    fn appended_records_are_replayed() {
        let directory = Directory::new("append");
        let path = directory.0.join("state");
        let mut state = StateFile::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(state.is_new() && state.path() == fs::canonicalize(&path).unwrap());
        state.replace([("/drop/input/any/3.3.3.3".parse().unwrap(), Some(5))].into_iter()).unwrap();
        assert!(!state.is_new());
        state.append([].into_iter()).unwrap();
        state.append([put(A, 0)].into_iter()).unwrap();
        state.append([put(B, 9), delete(A)].into_iter()).unwrap();
        let text = format!("{HEADER}+ 5 /drop/input/any/3.3.3.3\n+ 0 {A}\n");
        let list = format!("* 2\n+ 9 {B}\n- {A}\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{text}{list}"));
        let (rules, contents) = replay(&mut state);
        assert_eq!(rules, format!("/drop/input/any/3.3.3.3 5, {B} 9"));
        let size = (text.len() + list.len()) as u64;
        assert_eq!((contents, state.size), (Contents { size, ..Contents::default() }, size));
        // A change that the kernel rejects; one that changes no rule
        for _ in 0..2 {
            state.undo_append();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(state.size, text.len() as u64);
            state.append([].into_iter()).unwrap();
        }
        state.append([put(C, 1)].into_iter()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{text}+ 1 {C}\n"));
    }

    #[test]
    fn an_incomplete_tail_is_truncated() {
        let directory = Directory::new("tail");
        let complete = format!("{HEADER}+ 0 {A}\n");
        let path = directory.file(&format!("{complete}* 2\n+ 0 {B}\n"));
        StateFile::check(&path).unwrap();
        let mut state = StateFile::open(&path).unwrap();
        let (rules, contents) = replay(&mut state);
        assert_eq!(rules, format!("{A} 0, {B} 0"), "the caller begins again");
        assert_eq!(contents.dropped, ["* 2".into(), format!("+ 0 {B}").into_bytes()]);
        assert_eq!(fs::read_to_string(&path).unwrap(), complete);
        let (rules, contents) = replay(&mut state);
        assert_eq!((rules, contents.tail), (format!("{A} 0"), None));
        state.append([put(C, 0)].into_iter()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{complete}+ 0 {C}\n"));
    }

    #[test]
    fn a_failed_write_is_removed_before_the_next_change() {
        let directory = Directory::new("repair");
        let path = directory.file(HEADER);
        let mut state = StateFile::open(&path).unwrap();
        // From a disk that became read-only
        let file = std::mem::replace(&mut state.file, File::open(&path).unwrap());
        let error = state.append([put(A, 0)].into_iter()).unwrap_err();
        assert!(error.contains("cannot be written: Bad file descriptor"), "{error}");
        // Half of it was written, and could not be removed.
        state.file = file;
        (&state.file).write_all(b"+ 0 /dr").unwrap();
        assert!(state.needs_repair);
        state.append([put(B, 0)].into_iter()).unwrap();
        assert!(!state.needs_repair);
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{HEADER}+ 0 {B}\n"));
        // A change that the kernel rejected and that could not be removed either
        state.append([].into_iter()).unwrap();
        state.undo_append();
        assert!(!state.needs_repair, "nothing to truncate");
        state.append([put(A, 0)].into_iter()).unwrap();
        let file = std::mem::replace(&mut state.file, File::open(&path).unwrap());
        state.undo_append();
        assert!(state.needs_repair);
        state.file = file;
        state.append([put(C, 0)].into_iter()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{HEADER}+ 0 {B}\n+ 0 {C}\n"));
    }

    #[test]
    fn a_file_that_others_change_is_refused() {
        let directory = Directory::new("others");
        let path = directory.file(HEADER);
        let mut state = StateFile::open(&path).unwrap();
        let locked = StateFile::open(&path).map(|_| ()).unwrap_err().message;
        assert!(locked.contains("another rfw uses it"), "{locked}");
        let mut is_refused = || {
            let results = [state.append([put(A, 0)].into_iter()), state.replace([].into_iter())];
            for message in results.map(Result::unwrap_err) {
                assert!(message.contains("another program changed or removed "), "{message}");
            }
            state.undo_append();
        };
        let mut other = OpenOptions::new().append(true).open(&path).unwrap();
        other.write_all(b"+").unwrap();
        is_refused();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{HEADER}+"), "what they wrote");
        other.set_len(HEADER.len() as u64).unwrap();
        fs::rename(&path, directory.0.join("old")).unwrap();
        is_refused();
        fs::write(&path, HEADER).unwrap();
        is_refused();
        fs::rename(directory.0.join("old"), &path).unwrap();
        state.append([put(A, 0)].into_iter()).unwrap();
        // An error is not the absence of the file.
        assert!(is_same_file(&state.file, &path.join("below")).is_err());
        // A file that was replaced after it was opened
        let other = directory.0.join("other");
        fs::write(&other, HEADER).unwrap();
        assert!(!is_same_file(&File::open(&other).unwrap(), &path).unwrap());
    }

    #[test]
    fn which_files_are_read() {
        let directory = Directory::new("kinds");
        let path = directory.file(HEADER);
        let missing = directory.0.join("missing");
        let fails = |path: &Path, text: &str| {
            let open = StateFile::open(path).map(|_| ());
            for error in [open.unwrap_err(), StateFile::check(path).unwrap_err()] {
                assert!(error.line == 0 && error.message.contains(text), "{}", error.message);
            }
        };
        StateFile::check(&path).unwrap();
        StateFile::check(&missing).unwrap();
        assert!(!missing.exists());
        fs::write(&missing, "").unwrap();
        fs::set_permissions(&missing, fs::Permissions::from_mode(0o600)).unwrap();
        StateFile::check(&missing).unwrap();
        fs::write(&missing, "x\n").unwrap();
        assert_eq!(StateFile::check(&missing).unwrap_err().line, 1);
        let turning = directory.0.join("turning");
        symlink(&turning, &turning).unwrap();
        fails(&turning, "cannot open it: ");
        fails(&directory.0, "not a regular file");
        fails(&directory.0.join("no/state"), "its directory does not exist");
        for mode in [0o620, 0o602, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            fails(&path, "chmod go-w");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        StateFile::open(&path).unwrap();
        let table = [("state", "."), ("a/state", "a"), ("/state", "/")];
        for (path, expected) in table {
            assert_eq!(super::directory(Path::new(path)), Path::new(expected), "{path}");
        }
    }

    /// Through a link, and with a tail that was rejected and could not be truncated.
    #[test]
    fn compaction_replaces_the_file_that_a_link_points_to() {
        let directory = Directory::new("compact");
        let path = directory.file(&format!("{HEADER}+ 0 {A}\n"));
        let link = directory.0.join("link");
        symlink(&path, &link).unwrap();
        let mut state = StateFile::open(&link).unwrap();
        (&state.file).write_all(format!("+ 0 {B}\n").as_bytes()).unwrap();
        state.needs_repair = true;
        // What an interrupted compaction has left
        fs::write(directory.0.join("state.new"), "x").unwrap();
        state
            .replace([(A.parse().unwrap(), None), (C.parse().unwrap(), Some(7))].into_iter())
            .unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let text = format!("{HEADER}+ 0 {A}\n+ 7 {C}\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(!directory.0.join("state.new").exists());
        assert_eq!((state.size, state.needs_repair), (text.len() as u64, false));
        assert!(StateFile::open(&path).is_err(), "the new one is locked");
        state.append([delete(A)].into_iter()).unwrap();
        assert_eq!(replay(&mut state).0, format!("{C} 7"));
    }

    #[test]
    fn an_outdated_file_is_replaced() {
        let directory = Directory::new("outdated");
        let mut state = StateFile::open(&directory.file(HEADER)).unwrap();
        assert!(!state.is_outdated);
        state.is_outdated = true;
        assert!(state.is_outdated);
        state.replace([].into_iter()).unwrap();
        assert!(!state.is_outdated);
    }

    #[test]
    fn compaction_that_fails_leaves_the_file() {
        let directory = Directory::new("failed");
        let path = directory.file(&format!("{HEADER}+ 0 {A}\n"));
        let mut state = StateFile::open(&path).unwrap();
        fs::create_dir(directory.0.join("state.new")).unwrap();
        let error = state.replace([].into_iter()).unwrap_err();
        assert!(error.contains("cannot be compacted: "), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{HEADER}+ 0 {A}\n"));
    }

    #[test]
    fn when_the_file_is_compacted() {
        let directory = Directory::new("limit");
        let mut state = StateFile::open(&directory.file(HEADER)).unwrap();
        assert!(state.is_large(), "at its start, rfw rewrites it");
        state.replace([].into_iter()).unwrap();
        for (size, is_large) in [(65_536, false), (65_537, true), (12, false)] {
            state.size = size;
            assert_eq!(state.is_large(), is_large);
        }
        let path = |n| format!("/drop/input/any/1.0.{}.{}", n / 256, n % 256);
        state.replace((0..10_000).map(|n| (path(n).parse().unwrap(), None))).unwrap();
        let twice = 2 * state.size;
        for (size, is_large) in [(twice, false), (twice + 1, true)] {
            state.size = size;
            assert_eq!(state.is_large(), is_large);
        }
    }

    /// A change that was refused stayed in the file if its record could not be removed, and nothing
    /// tried again: a change that needs no record was acknowledged, and the next start carried out both.
    #[test]
    fn a_record_that_cannot_be_removed() {
        let directory = Directory::new("undo");
        let path = directory.file(HEADER);
        let mut state = StateFile::open(&path).unwrap();
        state.append([put(A, 0)].into_iter()).unwrap();
        state.append([delete(A)].into_iter()).unwrap();
        let file = std::mem::replace(&mut state.file, File::open(&path).unwrap());
        state.undo_append();
        assert!(state.append([].into_iter()).is_err());
        state.file = file;
        state.append([].into_iter()).unwrap();
        assert_eq!(replay(&mut state).0, format!("{A} 0"));
    }
}
