//! Which weight is stored in which format.

use std::path::Path;

use strata_kernels::{DType, Format};
use strata_layers::graph::GraphWeight;
use strata_layers::param::list_of;
use strata_layers::yaml::{self, Value};
use strata_layers::{Faults, Mark, Node, Role};

/// The recipes that everybody has.
const BUILT_IN: &str = include_str!("recipes.yaml");
const BUILT_IN_FILE: &str = "recipes.yaml";
/// The version of the language of recipes.
const VERSION: &str = "recipes";
/// The word for weights that are not quantised.
const KEEP: &str = "keep";

/// Which matrices get which format.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// What it is called.
    pub name: String,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq)]
struct Rule {
    weights: Vec<String>,
    /// The formats to try, in order; none keeps the weight as it is.
    formats: Vec<Format>,
}

impl Recipe {
    /// The built-in recipe of this name; of the name of a block format, that format wherever it fits; else
    /// the only recipe of the file of this name.
    pub fn find(name: &str) -> Result<Recipe, String> {
        let built_in = read(BUILT_IN, BUILT_IN_FILE).map_err(|faults| faults.to_string())?;
        if let Some(recipe) = built_in.iter().find(|r| r.name == name) {
            return Ok(recipe.clone());
        }
        if let Some(format) = Format::named(name).filter(|f| f.dtype().is_none()) {
            return Ok(Recipe::uniform(format));
        }
        let path = Path::new(name);
        if !path.is_file() {
            let recipes = list_of(built_in.iter().map(|r| r.name.as_str()));
            let formats = Format::ALL.into_iter().filter(|f| f.dtype().is_none());
            return Err(format!(
                "there is no recipe or file {name:?}; recipes are {recipes}, and the formats {} go wherever they fit",
                list_of(formats.map(Format::name))
            ));
        }
        let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: {e}"))?;
        let recipes = read(&text, name).map_err(|faults| faults.to_string())?;
        match <[Recipe; 1]>::try_from(recipes) {
            Ok([only]) => Ok(only),
            Err(several) => Err(format!(
                "{name} holds {} recipes, expected one",
                several.len()
            )),
        }
    }

    /// One format for all matrices but those that routers and narrow projections are.
    fn uniform(format: Format) -> Recipe {
        let keep = ["*.router", "*.x_proj", "*.dt_proj"].map(ToString::to_string);
        Recipe {
            name: format.name().into(),
            rules: vec![
                Rule {
                    weights: keep.to_vec(),
                    formats: Vec::new(),
                },
                Rule {
                    weights: vec!["*".into()],
                    formats: vec![format],
                },
            ],
        }
    }

    /// All formats that it may choose.
    pub fn formats(&self) -> impl Iterator<Item = Format> {
        self.rules.iter().flat_map(|r| r.formats.iter().copied())
    }

    /// The format of a weight; none if it stays as it is.
    pub fn choose(&self, weight: &GraphWeight) -> Option<Format> {
        if weight.spec.role == Role::Vector {
            return None;
        }
        let rule = self
            .rules
            .iter()
            .find(|r| r.weights.iter().any(|w| fits(w, &weight.path)))?;
        let fits = |f: &&Format| f.bytes_of(&weight.spec.shape).is_some();
        rule.formats.iter().find(fits).copied()
    }
}

/// Whether a pattern with `*` is that of a path.
fn fits(pattern: &str, path: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = path.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Reads recipes, with all their faults.
fn read(text: &str, file: &str) -> Result<Vec<Recipe>, Faults> {
    let root = yaml::parse(text, file)?;
    let mut faults = Faults::new(file);
    let Value::Map(entries) = &root.value else {
        faults.add(
            root.at,
            format!("found {}, expected recipes", root.value.describe()),
        );
        return Err(faults);
    };
    let mut recipes = Vec::new();
    let mut version = None;
    for entry in entries {
        if entry.key == VERSION {
            version = Some(&entry.value);
            continue;
        }
        let Value::List(rules) = &entry.value.value else {
            let found = entry.value.value.describe();
            faults.add(
                entry.value.at,
                format!("found {found}, expected a list of rules"),
            );
            continue;
        };
        let rules = rules
            .iter()
            .filter_map(|node| rule(node, &mut faults))
            .collect();
        recipes.push(Recipe {
            name: entry.key.clone(),
            rules,
        });
    }
    match version.map(|v| (&v.value, v.at)) {
        Some((Value::Int(1), _)) => {}
        Some((other, at)) => {
            faults.add(
                at,
                format!("found {}, expected version 1", other.describe()),
            );
        }
        None => faults.add(Mark::default(), "a file of recipes needs `recipes: 1`"),
    }
    if faults.is_empty() {
        Ok(recipes)
    } else {
        Err(faults)
    }
}

/// `{weights: [...], format: q4_k, otherwise: q5_0}`.
fn rule(node: &Node, faults: &mut Faults) -> Option<Rule> {
    let Value::Map(entries) = &node.value else {
        let found = node.value.describe();
        faults.add(
            node.at,
            format!("found {found}, expected weights and their format"),
        );
        return None;
    };
    let mut weights = None;
    let mut formats = [None, None];
    for entry in entries {
        match entry.key.as_str() {
            "weights" => weights = patterns(&entry.value, faults),
            "format" => formats[0] = Some(format(&entry.value, true, faults)?),
            "otherwise" => formats[1] = Some(format(&entry.value, false, faults)?),
            other => {
                let message =
                    format!("a rule has no `{other}`; it takes weights, format, otherwise");
                faults.add(entry.at, message);
            }
        }
    }
    if weights.is_none() || formats[0].is_none() {
        faults.add(node.at, "a rule needs `weights` and `format`");
        return None;
    }
    Some(Rule {
        weights: weights?,
        formats: formats.into_iter().flatten().flatten().collect(),
    })
}

fn patterns(node: &Node, faults: &mut Faults) -> Option<Vec<String>> {
    let Value::List(list) = &node.value else {
        let found = node.value.describe();
        faults.add(
            node.at,
            format!("found {found}, expected a list of weights"),
        );
        return None;
    };
    let text = |node: &Node| match &node.value {
        Value::Text(text) => Some(text.clone()),
        _ => None,
    };
    let patterns: Option<Vec<String>> = list.iter().map(text).collect();
    if patterns.is_none() {
        faults.add(node.at, "weights are named by texts, such as \"*.down\"");
    }
    patterns
}

/// A format in blocks; `keep` is none.
fn format(node: &Node, may_keep: bool, faults: &mut Faults) -> Option<Option<Format>> {
    let Value::Text(name) = &node.value else {
        let found = node.value.describe();
        faults.add(node.at, format!("found {found}, expected a format"));
        return None;
    };
    if may_keep && name == KEEP {
        return Some(None);
    }
    let found = Format::named(name).filter(|f| f.dtype().is_none());
    if found.is_none() {
        let formats = Format::ALL.into_iter().filter(|f| f.dtype().is_none());
        let known = list_of(formats.map(Format::name));
        faults.add(
            node.at,
            format!("there is no block format {name:?}; there are {known}"),
        );
    }
    found.map(Some)
}

/// How the weights of a model are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Storage {
    /// For matrices that no recipe quantises.
    pub format: Format,
    /// For the others.
    pub recipe: Option<Recipe>,
}

impl Storage {
    /// The format of a weight. Small weights run in f32 whatever the format; rows that are no whole blocks
    /// stay in bf16.
    pub fn of(&self, weight: &GraphWeight) -> Format {
        if weight.spec.role == Role::Vector {
            return Format::F32;
        }
        let chosen = self.recipe.as_ref().and_then(|r| r.choose(weight));
        let format = chosen.unwrap_or(self.format);
        match format.bytes_of(&weight.spec.shape) {
            Some(_) => format,
            None => Format::BF16,
        }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        self.recipe.as_ref().map_or(self.format.name(), |r| &r.name)
    }
}

impl From<Format> for Storage {
    fn from(format: Format) -> Self {
        Storage {
            format,
            recipe: None,
        }
    }
}

impl From<DType> for Storage {
    fn from(dtype: DType) -> Self {
        Format::from(dtype).into()
    }
}

#[cfg(test)]
mod tests {
    use strata_layers::{Init, WeightSpec};

    use super::*;

    fn weight(path: &str, shape: &[usize], role: Role) -> GraphWeight {
        let spec = WeightSpec {
            role,
            ..WeightSpec::vector("w", shape, Init::Normal)
        };
        GraphWeight {
            path: path.into(),
            spec,
        }
    }

    #[test]
    fn the_first_rule_that_fits_counts() {
        let recipe = Recipe::find("q4_k_m").unwrap();
        let choose =
            |path: &str, shape: &[usize]| recipe.choose(&weight(path, shape, Role::Matrix));
        assert_eq!(choose("blocks.3.mlp.up", &[8, 512]), Some(Format::Q4K));
        assert_eq!(choose("blocks.3.mlp.down", &[8, 512]), Some(Format::Q6K));
        assert_eq!(choose("blocks.3.moe.down.17", &[8, 512]), Some(Format::Q6K));
        assert_eq!(choose("blocks.3.moe.router", &[8, 512]), None);
        assert_eq!(choose("head", &[8, 512]), Some(Format::Q6K));
        // No whole blocks of 256, then none of 32.
        assert_eq!(choose("blocks.3.mlp.up", &[8, 96]), Some(Format::Q5_0));
        assert_eq!(choose("blocks.3.mlp.up", &[8, 40]), None);
        let vector = weight("blocks.3.mamba1.a", &[512, 16], Role::Vector);
        assert_eq!(recipe.choose(&vector), None);
    }

    #[test]
    fn faults_come_with_their_places() {
        let text = "recipes: 1\nx:\n  - {weights: [a], format: q9}\n  - {weight: [a], format: q8_0}\n  - 3\n";
        let faults = read(text, "my.yaml").unwrap_err().to_string();
        for expected in [
            "my.yaml:3:",
            "no block format \"q9\"",
            "no `weight`",
            "my.yaml:5:",
        ] {
            assert!(faults.contains(expected), "{expected}: {faults}");
        }
        assert!(Recipe::find("q9").unwrap_err().contains("q4_k_m"));
        assert_eq!(Recipe::find("iq4_nl").unwrap().name, "iq4_nl");
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, path, expected) in [
            ("*", "a.b", true),
            ("embed", "embed", true),
            ("embed", "embed.prefix", false),
            ("*.down.*", "blocks.1.moe.down.3", true),
            ("*.down.*", "blocks.1.moe.down", false),
            ("*.v", "blocks.1.attention.v", true),
        ] {
            assert_eq!(fits(pattern, path), expected, "{pattern} {path}");
        }
    }
}
