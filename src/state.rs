//! The state file: the list of rules that outlives a reboot.
//!
//! ```text
//! file   = "rfw state 1" LF *( change / list )
//! change = ( "+" SP expires SP path / "-" SP path ) LF   ; Unix seconds, 0 is for ever
//! list   = "*" SP count LF count(change)                 ; all of them or none
//! ```
//!
//! Changes are appended, and on the disk before the kernel is asked. What the kernel
//! then refuses is cut off again: further lines could not bring back the order of
//! rules, nor be written to a disk that is full.

use crate::rule::whitelist::LineError;
use crate::rule::{Rule, is_number};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const HEADER: &str = "rfw state 1\n";
/// The longest line in bytes; the longest path is far shorter.
const MAX_LINE: u64 = 512;
/// How large the file may always become before it is compacted.
const SMALL: u64 = 64 * 1024;

/// A rule to have, with its expiry in Unix seconds if it has one, or not to have.
pub type Wanted = (Rule, Option<Option<u64>>);
/// A rule to have.
pub type Kept = (Rule, Option<u64>);

/// An open state file. It is locked, so no other rfw has it.
pub struct State {
    path: PathBuf,
    file: File,
    /// How many bytes of it count.
    size: u64,
    /// Whether there may be more, or its name may not be on the disk yet.
    dirty: bool,
    /// Over this size it is compacted.
    limit: u64,
}

/// What a file says.
struct Content {
    changes: Vec<Wanted>,
    /// How many bytes count; behind them is what a power cut has left.
    size: u64,
    torn: bool,
}

impl State {
    /// Opens and locks a file, and makes it where there is none. Returns also what it
    /// names, `None` if it is new, and whether its end was torn.
    pub fn open(path: &Path) -> Result<(State, Option<Vec<Kept>>, bool), LineError> {
        let wrong = |error: io::Error| whole(format!("cannot open it: {error}"));
        check_kind(path)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(path);
        // From a disk that takes nothing any more, the list still comes.
        let file = file.or_else(|error| match error.kind() {
            ErrorKind::ReadOnlyFilesystem => File::open(path),
            _ => Err(error),
        });
        let file = file.map_err(wrong)?;
        let locked = file.try_lock().is_ok() && same_file(&file, path).map_err(wrong)?;
        if !locked {
            let message = "another rfw has it; stop that one, or set state.file to another file";
            return Err(whole(message.into()));
        }
        // A link stays: what is put in the file's place goes where it points to.
        let (path, dirty) = (fs::canonicalize(path).map_err(wrong)?, false);
        if file.metadata().map_err(wrong)?.len() == 0 {
            return Ok((State { path, file, size: 0, dirty, limit: 0 }, None, false));
        }
        let Content { changes, size, torn } = read(&mut BufReader::new(&file))?;
        let kept = live(&changes);
        // What the list takes, its lines being as long as others.
        let part = size.saturating_mul(kept.len() as u64).checked_div(changes.len() as u64);
        let limit = limit_of(part.unwrap_or(0));
        let mut state = State { path, file, size, dirty: torn, limit };
        let _ = state.clean();
        Ok((state, Some(kept), torn))
    }

    /// Looks whether a file, if there is one, can be read.
    pub fn check(path: &Path) -> Result<(), LineError> {
        check_kind(path)?;
        match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Ok(file) if file.metadata().is_ok_and(|data| data.len() == 0) => Ok(()),
            Ok(file) => read(&mut BufReader::new(file)).map(|_| ()),
            Err(error) => Err(whole(format!("cannot open it: {error}"))),
        }
    }

    /// Where the file ends now, to be cut off there.
    pub fn mark(&self) -> u64 {
        self.size
    }

    /// Writes changes to the disk, all of them or none; a list, which says how many they
    /// are, also counts as a whole if power is cut. The error is a sentence.
    pub fn append(
        &mut self,
        changes: impl Iterator<Item = Wanted>,
        list: Option<usize>,
    ) -> Result<(), String> {
        let mut changes = changes.peekable();
        if changes.peek().is_none() {
            return Ok(());
        }
        let written = self.untouched().and_then(|()| self.clean()).and_then(|()| {
            self.dirty = true;
            let mut out = BufWriter::new(&self.file);
            if let Some(count) = list {
                writeln!(out, "* {count}")?;
            }
            for (rule, wanted) in changes {
                out.write_all(line_of(&rule, wanted).as_bytes())?;
            }
            out.into_inner().map_err(io::IntoInnerError::into_error)?;
            self.file.sync_data()?;
            self.file.metadata()
        });
        match written {
            Ok(data) => {
                (self.size, self.dirty) = (data.len(), false);
                Ok(())
            }
            Err(error) => {
                let _ = self.clean();
                Err(format!("{} cannot be written: {error}.", self.path.display()))
            }
        }
    }

    /// Takes back what was appended since a mark. Where that fails, the next change is
    /// refused unless it can be done then.
    pub fn cut(&mut self, mark: u64) {
        if self.size > mark {
            (self.size, self.dirty) = (mark, true);
            let _ = self.clean();
        }
    }

    /// Whether the file is as it was left, in its place.
    fn untouched(&self) -> io::Result<()> {
        let whole = self.dirty || self.file.metadata()?.len() == self.size;
        match same_file(&self.file, &self.path)? && whole {
            true => Ok(()),
            false => Err(io::Error::other("others have changed it; start rfw anew")),
        }
    }

    fn clean(&mut self) -> io::Result<()> {
        if self.dirty {
            self.file.set_len(self.size)?;
            self.file.sync_data()?;
            File::open(folder(&self.path))?.sync_all()?;
            self.dirty = false;
        }
        Ok(())
    }

    /// Whether it is time to compact the file.
    pub fn is_large(&self) -> bool {
        self.size > self.limit
    }

    /// Writes the file anew with what it names and has not expired at `now`, each time of
    /// expiry moved. The error is a sentence; then the file is as it was.
    pub fn compact(&mut self, now: u64, moved: impl Fn(u64) -> u64) -> Result<(), String> {
        let kept = self.kept()?.into_iter().map(|(rule, expires)| (rule, expires.map(&moved)));
        self.replace(kept.filter(|(_, expires)| expires.is_none_or(|second| second > now)))
    }

    /// The rules that it names, the oldest first. The error is a sentence.
    pub fn kept(&self) -> Result<Vec<Kept>, String> {
        let read = |file: File| {
            read(&mut BufReader::new(file.take(self.size))).map_err(|error| error.message)
        };
        let content = File::open(&self.path).map_err(|error| error.to_string()).and_then(read);
        let content = content.map_err(|why| format!("{}: {why}", self.path.display()))?;
        Ok(live(&content.changes))
    }

    /// Puts a file with these rules, the oldest first, in the place of this one.
    pub fn replace(&mut self, kept: impl Iterator<Item = Kept>) -> Result<(), String> {
        // Not at once again, if that fails.
        self.limit = limit_of(self.size);
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let replaced = self.write_beside(new.as_ref(), kept);
        replaced.map_err(|error| {
            let _ = fs::remove_file(&new);
            format!("{} cannot be written anew: {error}", self.path.display())
        })
    }

    fn write_beside(&mut self, new: &Path, kept: impl Iterator<Item = Kept>) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let _ = fs::remove_file(new);
        let file = options.read(true).append(true).create_new(true).mode(0o600).open(new)?;
        file.try_lock()?;
        let mut out = BufWriter::new(&file);
        out.write_all(HEADER.as_bytes())?;
        for (rule, expires) in kept {
            out.write_all(line_of(&rule, Some(expires)).as_bytes())?;
        }
        out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        let size = file.metadata()?.len();
        fs::rename(new, &self.path)?;
        // The old one has no name any more, whatever becomes of the folder.
        (self.file, self.size, self.dirty) = (file, size, true);
        self.limit = limit_of(size);
        self.clean()
    }
}

/// How large a file may become whose list takes so many bytes.
fn limit_of(needed: u64) -> u64 {
    needed.saturating_mul(2).max(SMALL)
}

fn whole(message: String) -> LineError {
    LineError { line: 0, message }
}

/// A file that decides who is blocked; nothing that could be waited for.
fn check_kind(path: &Path) -> Result<(), LineError> {
    match fs::metadata(path) {
        Ok(data) if !data.is_file() => Err(whole("it is no file".into())),
        Ok(data) if data.mode() & 0o022 != 0 => {
            Err(whole("others than its owner may write it; run chmod go-w on it".into()))
        }
        Err(error) if !folder(path).is_dir() => {
            Err(whole(format!("its folder is not there ({error}); run mkdir -m 700 on it")))
        }
        _ => Ok(()),
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// Whether a file that was locked still has that name: another rfw may have put a new one there.
fn same_file(file: &File, path: &Path) -> io::Result<bool> {
    let (ours, there) = (file.metadata()?, fs::metadata(path)?);
    Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino()))
}

fn line_of(rule: &Rule, wanted: Option<Option<u64>>) -> String {
    match wanted {
        Some(expires) => format!("+ {} {rule}\n", expires.unwrap_or(0)),
        None => format!("- {rule}\n"),
    }
}

fn read(source: &mut impl BufRead) -> Result<Content, LineError> {
    let mut content = Content { changes: Vec::new(), size: 0, torn: false };
    // A list that is not whole yet: how many changes there are with it, and without
    // it, and where it begins.
    let mut list: Option<(usize, usize, u64)> = None;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let wrong = |message| LineError { line: number, message };
        let length = source.take(MAX_LINE).read_until(b'\n', &mut line);
        let length = length.map_err(|error| wrong(error.to_string()))? as u64;
        if !line.ends_with(b"\n") && length < MAX_LINE {
            content.torn = length > 0;
            break;
        }
        let text = String::from_utf8_lossy(&line);
        let damaged = || {
            let what = match number {
                1 => "not how a state file of rfw's begins; set state.file to another",
                _ => "no line of rfw's; mend it, or move the file away to begin a new one",
            };
            wrong(format!("'{}' is {what}", text.trim_end_matches('\n').escape_default()))
        };
        let before = content.changes.len();
        match (number, list_length(&text)) {
            (1, _) if text == HEADER => {}
            (2.., Some(count)) if list.is_none() => {
                list = Some((before.saturating_add(count), before, content.size));
            }
            (2.., None) => content.changes.push(change(&text).ok_or_else(damaged)?),
            _ => return Err(damaged()),
        }
        content.size = content.size.saturating_add(length);
        list = list.filter(|(end, ..)| content.changes.len() < *end);
    }
    if content.size == 0 {
        return Err(LineError { line: 1, message: "the first line must be: rfw state 1".into() });
    }
    if let Some((_, before, size)) = list {
        content.changes.truncate(before);
        (content.size, content.torn) = (size, true);
    }
    Ok(content)
}

fn list_length(line: &str) -> Option<usize> {
    let count = line.strip_prefix("* ")?.strip_suffix('\n')?;
    count.parse().ok().filter(|_| is_number(count))
}

fn change(line: &str) -> Option<Wanted> {
    let (verb, rest) = line.strip_suffix('\n')?.split_once(' ')?;
    match verb {
        "+" => {
            let (expires, path) = rest.split_once(' ')?;
            let second: u64 = expires.parse().ok().filter(|_| is_number(expires))?;
            Some((path.parse().ok()?, Some((second > 0).then_some(second))))
        }
        "-" => Some((rest.parse().ok()?, None)),
        _ => None,
    }
}

/// The rules that changes come to, in the order in which they were last put.
fn live(changes: &[Wanted]) -> Vec<Kept> {
    let mut seen = HashSet::new();
    let last = changes.iter().rev().filter(|(rule, _)| seen.insert(*rule));
    let mut kept: Vec<Kept> = last.filter_map(|(rule, wanted)| Some((*rule, (*wanted)?))).collect();
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a text comes to: its rules, the bytes that count and whether its end is torn;
    /// or the line that is wrong.
    fn come_to(text: &str) -> Result<(String, u64, bool), usize> {
        let content = read(&mut text.as_bytes()).map_err(|error| error.line)?;
        let show = |(rule, expires): &Kept| format!("{rule} {}", expires.unwrap_or(0));
        let kept: Vec<String> = live(&content.changes).iter().map(show).collect();
        Ok((kept.join(", "), content.size, content.torn))
    }

    const A: &str = "/drop/input/any/1.1.1.1";
    const B: &str = "/drop/input/any/2.2.2.0/24";
    const C: &str = "/accept/forward/eth0/5::/ppp+/6::/64";

    #[test]
    fn files() {
        let table = [
            (String::new(), String::new()),
            (format!("+ 0 {A}\n+ 9 {B}\n"), format!("{A} 0, {B} 9")),
            (format!("+ 0 {A}\n+ 9 {B}\n+ 7 {A}\n"), format!("{B} 9, {A} 7")),
            (format!("+ 0 {A}\n- {A}\n+ 9 {C}\n- {B}\n"), format!("{C} 9")),
            (format!("* 2\n+ 0 {A}\n- {B}\n* 0\n+ 1 {C}\n"), format!("{A} 0, {C} 1")),
        ];
        for (lines, kept) in table {
            let text = format!("{HEADER}{lines}");
            assert_eq!(come_to(&text), Ok((kept, text.len() as u64, false)), "{text}");
        }
    }

    #[test]
    fn a_power_cut_at_every_byte() {
        let text = format!("{HEADER}+ 0 {A}\n* 2\n+ 0 {B}\n- {A}\n+ 9 {C}\n");
        let lines: Vec<usize> = text.match_indices('\n').map(|(at, _)| at + 1).collect();
        let (a, list) = (lines[1], lines[4]);
        for end in lines[0]..=text.len() {
            let (kept, size) = match end {
                _ if end == text.len() => (format!("{B} 0, {C} 9"), end),
                _ if end >= list => (format!("{B} 0"), list),
                _ if end >= a => (format!("{A} 0"), a),
                _ => (String::new(), lines[0]),
            };
            let torn = size < end;
            assert_eq!(come_to(&text[..end]), Ok((kept, size as u64, torn)), "{end}");
        }
    }

    #[test]
    fn damage() {
        let long = format!("+ 0 {}", "x".repeat(600));
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
            "* x",
            "* +1",
            "*",
            "\0\0\0",
            "* 2\n* 1",
            &long,
        ];
        for line in table {
            let wrong = 2 + line.matches('\n').count();
            let text = format!("{HEADER}{line}\n+ 0 {A}\n");
            assert_eq!(come_to(&text), Err(wrong), "{line:?}");
        }
        assert_eq!(come_to("rfw state 2\n"), Err(1));
        assert_eq!(come_to(&format!("{HEADER}{HEADER}")), Err(2));
    }

    /// Through a link, and with an end that was refused and could not be cut off.
    #[test]
    fn compacted_in_its_place() {
        let folder = std::env::temp_dir().join(format!("rfw-state-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (path, link) = (folder.join("state"), folder.join("link"));
        fs::write(&path, format!("{HEADER}+ 0 {A}\n")).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (mut state, ..) = State::open(&link).unwrap();
        (&state.file).write_all(format!("+ 0 {B}\n").as_bytes()).unwrap();
        state.dirty = true;
        state.compact(1, |second| second).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{HEADER}+ 0 {A}\n"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
