//! The model cards that the binary holds: all of `model-cards/`.

use std::sync::LazyLock;

use strata_layers::param::list_of;

use crate::card::Card;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::nearest;

/// Names and texts, sorted by name; listed while building.
const TEXTS: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/cards.rs"));

static CARDS: LazyLock<Vec<Card>> = LazyLock::new(|| {
    let read = |(name, text): &(&str, &str)| {
        let card = Card::parse(text, &format!("model-cards/{name}"));
        card.unwrap_or_else(|faults| panic!("a card of this binary is faulty: {faults}"))
    };
    TEXTS.iter().map(read).collect()
});

/// All cards, sorted by the names of their files.
pub fn all() -> &'static [Card] {
    &CARDS
}

/// The files beside a config.json that some family's models have more keys in.
pub fn beside_config() -> impl Iterator<Item = &'static str> {
    all().iter().filter_map(Card::also)
}

/// The files that may hold a model's config: config.json, and what some family's models have in its place.
pub fn config_names() -> impl Iterator<Item = &'static str> {
    std::iter::once("config.json").chain(all().iter().filter_map(Card::instead))
}

/// The card of a family.
pub fn named(family: &str) -> Option<&'static Card> {
    all().iter().find(|c| c.family() == family)
}

/// The card that a config asks for: by `architectures`, then by `model_type`, which early files of
/// some families borrowed from another, then by what the cards' `match` says of its keys.
pub fn find(config: &Config) -> Result<&'static Card> {
    // A file in the place of config.json belongs to those families whose cards name it: its keys may mean
    // something else to others.
    let file = config.file().rsplit(['/', '\\']).next();
    let own = |c: &&Card| c.instead().is_some() && c.instead() == file;
    if let Some(card) = all().iter().filter(own).find(|c| c.matches(config)) {
        return Ok(card);
    }
    let architectures = config.texts("architectures");
    let types = config.texts("model_type");
    let by_architecture = all().iter().find(|c| {
        c.architectures()
            .iter()
            .any(|a| architectures.contains(&a.as_str()))
    });
    let by_type = || {
        all()
            .iter()
            .find(|c| c.model_types().iter().any(|t| types.contains(&t.as_str())))
    };
    let by_match = || all().iter().find(|c| c.matches(config));
    let found = by_architecture.or_else(by_type).or_else(by_match);
    found.ok_or_else(|| {
        let known = list_of(
            all()
                .iter()
                .flat_map(|c| c.architectures().iter().map(String::as_str)),
        );
        let found = match (&architectures[..], &types[..]) {
            ([], []) => {
                "neither `architectures` nor `model_type` is given, and no card knows these keys"
                    .into()
            }
            ([], types) => format!(
                "no model card is for model_type {}",
                list_of(types.iter().copied())
            ),
            (names, _) => format!("no model card is for {}", list_of(names.iter().copied())),
        };
        let nearest = nearest::families(config, all());
        let like = match nearest.is_empty() {
            true => String::new(),
            false => format!("\n  nearest: {}", nearest.join("; ")),
        };
        let write = "\n  a new family is one file, which model-cards/README.md tells how to write; give it with --card FILE";
        Error::file(
            config.file(),
            format!("{found}; there are cards for {known}{like}{write}"),
        )
    })
}
