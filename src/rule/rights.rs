//! What a user may do. This is the only place that decides it.

use super::tag::Tag;
use super::{Action, Change, Rule, RuleTemplate, Rules};

/// The rights of a user; every user may read.
///
/// ```text
/// rights = "all" / "read" / "tag=" tag *( "," tag )
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rights {
    All,
    /// Changes with one of these tags; `read` has none.
    Tags(Vec<Tag>),
}

/// An action that a user requests on rules with a tag; [`Tag::NONE`] if the request names none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Intent {
    pub action: Action,
    pub tag: Tag,
}

/// An action that a user may take on rules with a tag. Only [`Rights::allow`] makes one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowed(Intent);

impl Rights {
    pub fn parse(text: &str) -> Option<Rights> {
        match text {
            "all" => Some(Rights::All),
            "read" => Some(Rights::Tags(Vec::new())),
            _ => {
                let tags = text.strip_prefix("tag=")?.split(',').map(Tag::parse);
                tags.collect::<Option<_>>().map(Rights::Tags)
            }
        }
    }

    /// An intent without a tag gets the first one of the user. The error has the tags with which the
    /// user may make changes.
    pub fn allow(&self, intent: Intent) -> Result<Allowed, Vec<Tag>> {
        let Rights::Tags(tags) = self else { return Ok(Allowed(intent)) };
        let tag = match intent {
            Intent { action: Action::DeleteAnyTag, .. } => None,
            Intent { tag: Tag::NONE, .. } => tags.first(),
            Intent { tag, .. } => tags.iter().find(|own| **own == tag),
        };
        match tag {
            Some(tag) => Ok(Allowed(Intent { tag: *tag, ..intent })),
            None => Err(tags.clone()),
        }
    }
}

impl Allowed {
    pub fn action(self) -> Action {
        self.0.action
    }

    /// The tag of all rules that may change; [`Tag::NONE`] for [`Action::DeleteAnyTag`].
    pub fn tag(self) -> Tag {
        self.0.tag
    }

    /// The change of these rules, with the allowed tag in place of theirs.
    pub(super) fn change(self, rules: Rules) -> Change {
        let Intent { action, tag } = self.0;
        let rules = match rules {
            Rules::One(rule) => Rules::One(Rule { tag, ..rule }),
            Rules::List(template, nets) => Rules::List(RuleTemplate { tag, ..template }, nets),
            Rules::Tagged(_, chain) => Rules::Tagged(tag, chain),
        };
        Change { rules, action }
    }
}

#[cfg(test)]
impl Rights {
    /// An action that a user with all rights takes on untagged rules.
    pub fn admin(action: Action) -> Allowed {
        Rights::All.allow(Intent { action, tag: Tag::NONE }).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Chain;
    use crate::rule::net::Net;

    fn tag(name: &str) -> Tag {
        if name.is_empty() { Tag::NONE } else { Tag::parse(name).unwrap() }
    }

    #[test]
    fn rights() {
        let tags =
            |names: &[&str]| Some(Rights::Tags(names.iter().map(|name| tag(name)).collect()));
        let table = [
            ("all", Some(Rights::All)),
            ("read", tags(&[])),
            ("tag=a", tags(&["a"])),
            ("tag=b,a.2", tags(&["b", "a.2"])),
            ("", None),
            ("All", None),
            ("write", None),
            ("a", None),
            ("tag", None),
            ("tag=", None),
            ("tag=a,", None),
            ("tag=a,B", None),
            ("tag=*", None),
            ("tag=all,*", None),
        ];
        for (text, rights) in table {
            assert_eq!(Rights::parse(text), rights, "{text}");
        }
    }

    /// The action and tag of an intent; the resulting tag for each kind of user, `-` for 403.
    #[test]
    fn what_is_allowed() {
        let (put, replace) = (Action::Put(0), Action::Replace(0));
        let table = [
            (put, "", ["", "-", "a", "b"]),
            (put, "a", ["a", "-", "a", "a"]),
            (put, "b", ["b", "-", "-", "b"]),
            (put, "c", ["c", "-", "-", "-"]),
            (replace, "", ["", "-", "a", "b"]),
            (replace, "b", ["b", "-", "-", "b"]),
            (Action::Delete, "", ["", "-", "a", "b"]),
            (Action::Delete, "a", ["a", "-", "a", "a"]),
            (Action::Delete, "c", ["c", "-", "-", "-"]),
            (Action::DeleteAnyTag, "", ["", "-", "-", "-"]),
        ];
        let users = ["all", "read", "tag=a", "tag=b,a"].map(|text| Rights::parse(text).unwrap());
        for (action, name, expected) in table {
            let intent = Intent { action, tag: tag(name) };
            for (rights, expected) in users.iter().zip(expected) {
                let got = match rights.allow(intent) {
                    Ok(allowed) => {
                        assert_eq!(allowed.action(), action);
                        allowed.tag()
                    }
                    Err(tags) => {
                        assert_eq!(*rights, Rights::Tags(tags));
                        assert_eq!(expected, "-", "{action:?} {name} {rights:?}");
                        continue;
                    }
                };
                assert_eq!(got.name(), expected, "{action:?} {name} {rights:?}");
            }
        }
    }

    #[test]
    fn a_change_has_the_tag_that_is_allowed() {
        let rights = Rights::Tags(vec![tag("a")]);
        let intent = Intent { action: Action::Delete, tag: Tag::NONE };
        let change = |rules| rights.allow(intent).unwrap().change(rules);
        let rule: Rule = "/drop/input/any/1.2.3.4@b".parse().unwrap();
        let (template, net) = rule.template().unwrap();
        let nets: Vec<Net> = vec![net];
        let Rules::One(one) = change(Rules::One(rule)).rules else { panic!("one") };
        let Rules::List(list, _) = change(Rules::List(template, nets)).rules else {
            panic!("many")
        };
        assert_eq!((one.tag, list.tag), (tag("a"), tag("a")));
        let tagged = change(Rules::Tagged(tag("b"), Some(Chain::Input)));
        assert_eq!(tagged.rules, Rules::Tagged(tag("a"), Some(Chain::Input)));
        assert_eq!(tagged.action, Action::Delete);
    }
}
