//! A radix tree over tokens: what begins alike shares its path. It knows nothing of what its nodes carry.

use std::collections::BTreeMap;

use crate::ids::TokenId;

/// A place in the tree: the tokens from the root to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(usize);

/// Where every path begins.
pub const ROOT: NodeId = NodeId(0);

/// A node: the run of tokens that leads to it from its parent, and what it carries.
///
/// These hold, and the tree keeps them: no run is empty but the root's; the children of a node differ in their first
/// token; a node without a load has at least two children, unless it is the root.
#[derive(Debug)]
struct Node<T> {
    parent: NodeId,
    run: Vec<TokenId>,
    depth: usize,
    children: BTreeMap<TokenId, NodeId>,
    load: Option<T>,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Tree<T> {
    nodes: Vec<Option<Node<T>>>,
    free: Vec<NodeId>,
}

/// How far some tokens are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk {
    /// So many of the tokens.
    pub matched: usize,
    /// The nodes passed, the root first.
    pub path: Vec<NodeId>,
    /// The node whose run the walk ended in, short of its end.
    pub inside: Option<NodeId>,
    /// A token that is known to follow where the walk ended.
    pub next: Option<TokenId>,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        let root = Node {
            parent: ROOT,
            run: Vec::new(),
            depth: 0,
            children: BTreeMap::new(),
            load: None,
        };
        Tree {
            nodes: vec![Some(root)],
            free: Vec::new(),
        }
    }
}

impl<T> Tree<T> {
    fn node(&self, id: NodeId) -> &Node<T> {
        self.nodes[id.0].as_ref().expect("a node of the tree")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node<T> {
        self.nodes[id.0].as_mut().expect("a node of the tree")
    }

    /// Walks as far as the tokens are known.
    pub fn walk(&self, tokens: &[TokenId]) -> Walk {
        let mut walk = Walk {
            matched: 0,
            path: vec![ROOT],
            inside: None,
            next: None,
        };
        let mut at = ROOT;
        loop {
            let rest = &tokens[walk.matched..];
            let children = &self.node(at).children;
            let Some(child) = rest.first().and_then(|t| children.get(t)).copied() else {
                walk.next = children.keys().next().copied();
                return walk;
            };
            let run = &self.node(child).run;
            let alike = run.iter().zip(rest).take_while(|(a, b)| a == b).count();
            walk.matched += alike;
            if alike < run.len() {
                walk.inside = Some(child);
                walk.next = Some(run[alike]);
                return walk;
            }
            walk.path.push(child);
            at = child;
        }
    }

    /// The node of these tokens, which is made if need be. It is to be given a load, or pruned.
    pub fn insert(&mut self, tokens: &[TokenId]) -> NodeId {
        let walk = self.walk(tokens);
        let mut at = *walk.path.last().expect("the root at least");
        if let Some(below) = walk.inside {
            at = self.split(below, walk.matched);
        }
        if walk.matched == tokens.len() {
            return at;
        }
        let run = tokens[walk.matched..].to_vec();
        let first = run[0];
        let new = self.add(Node {
            parent: at,
            run,
            depth: tokens.len(),
            children: BTreeMap::new(),
            load: None,
        });
        self.node_mut(at).children.insert(first, new);
        new
    }

    fn add(&mut self, node: Node<T>) -> NodeId {
        if let Some(id) = self.free.pop() {
            self.nodes[id.0] = Some(node);
            return id;
        }
        self.nodes.push(Some(node));
        NodeId(self.nodes.len() - 1)
    }

    /// Makes a node at `depth`, within the run of a node.
    fn split(&mut self, below: NodeId, depth: usize) -> NodeId {
        let node = self.node_mut(below);
        let (parent, start) = (node.parent, node.depth - node.run.len());
        let rest = node.run.split_off(depth - start);
        let run = std::mem::replace(&mut node.run, rest);
        let (first, next) = (run[0], node.run[0]);
        let new = self.add(Node {
            parent,
            run,
            depth,
            children: BTreeMap::from([(next, below)]),
            load: None,
        });
        self.node_mut(below).parent = new;
        self.node_mut(parent).children.insert(first, new);
        new
    }

    /// Forgets a node that carries nothing, as far as nothing depends on it.
    pub fn prune(&mut self, id: NodeId) {
        let mut at = id;
        while at != ROOT && self.node(at).load.is_none() {
            let children: Vec<NodeId> = self.node(at).children.values().take(2).copied().collect();
            match children[..] {
                [] => {
                    let node = self.take(at);
                    self.node_mut(node.parent).children.remove(&node.run[0]);
                    at = node.parent;
                }
                [child] => {
                    let node = self.take(at);
                    let below = self.node_mut(child);
                    below.parent = node.parent;
                    let mut run = node.run;
                    run.append(&mut below.run);
                    let first = run[0];
                    below.run = run;
                    self.node_mut(node.parent).children.insert(first, child);
                    return;
                }
                _ => return,
            }
        }
    }

    fn take(&mut self, id: NodeId) -> Node<T> {
        self.free.push(id);
        self.nodes[id.0].take().expect("a node of the tree")
    }

    /// What a node carries.
    pub fn load(&self, id: NodeId) -> Option<&T> {
        self.node(id).load.as_ref()
    }

    /// The same, to change. Who takes it away prunes the node.
    pub fn load_mut(&mut self, id: NodeId) -> &mut Option<T> {
        &mut self.node_mut(id).load
    }

    /// Tokens from the root to a node.
    pub fn depth(&self, id: NodeId) -> usize {
        self.node(id).depth
    }

    /// Those tokens.
    pub fn tokens(&self, id: NodeId) -> Vec<TokenId> {
        let mut runs = Vec::new();
        let mut at = id;
        while at != ROOT {
            runs.push(&self.node(at).run);
            at = self.node(at).parent;
        }
        runs.into_iter().rev().flatten().copied().collect()
    }

    /// The nodes from one to the root, that one first.
    pub fn upward(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        let next = |at: &NodeId| (*at != ROOT).then(|| self.node(*at).parent);
        std::iter::successors(Some(id), next)
    }

    /// Whether nothing goes on from a node.
    pub fn is_leaf(&self, id: NodeId) -> bool {
        self.node(id).children.is_empty()
    }

    /// A leaf at or below a node.
    pub fn leaf(&self, id: NodeId) -> NodeId {
        let mut at = id;
        while let Some(child) = self.node(at).children.values().next() {
            at = *child;
        }
        at
    }

    /// All nodes and what they carry.
    pub fn loads(&self) -> impl Iterator<Item = (NodeId, &T)> {
        self.nodes.iter().enumerate().filter_map(|(i, node)| {
            let load = node.as_ref()?.load.as_ref()?;
            Some((NodeId(i), load))
        })
    }

    /// What does not hold that should; for tests.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut reached = 0;
        let mut open = vec![ROOT];
        while let Some(id) = open.pop() {
            reached += 1;
            let node = self.node(id);
            if id != ROOT && (node.run.is_empty() || node.load.is_none() && node.children.len() < 2)
            {
                faults.push(format!("{id:?} is of no use"));
            }
            for (first, child) in &node.children {
                let below = self.node(*child);
                let right = below.parent == id
                    && below.run.first() == Some(first)
                    && below.depth == node.depth + below.run.len();
                if !right {
                    faults.push(format!("{child:?} does not fit below {id:?}"));
                }
                open.push(*child);
            }
        }
        if reached + self.free.len() != self.nodes.len() {
            faults.push(format!(
                "{reached} nodes are reached of {}, {} are free",
                self.nodes.len(),
                self.free.len()
            ));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(tree: &Tree<u8>, tokens: &[TokenId]) -> (usize, usize, bool, Option<TokenId>) {
        let walk = tree.walk(tokens);
        (
            walk.matched,
            walk.path.len(),
            walk.inside.is_some(),
            walk.next,
        )
    }

    #[test]
    fn what_begins_alike_shares_its_path() {
        let mut tree = Tree::default();
        for (tokens, load) in [
            (&[1, 2, 3, 4][..], 1),
            (&[1, 2, 5], 2),
            (&[1, 2, 3, 4, 6], 3),
        ] {
            let node = tree.insert(tokens);
            *tree.load_mut(node) = Some(load);
            assert_eq!(tree.tokens(node), tokens);
            assert_eq!(tree.faults(), Vec::<String>::new());
        }
        assert_eq!(walk(&tree, &[1, 2, 3, 4, 6, 7]), (5, 4, false, None));
        assert_eq!(walk(&tree, &[1, 2, 3]), (3, 2, true, Some(4)));
        assert_eq!(walk(&tree, &[1, 2, 9]), (2, 2, false, Some(3)));
        assert_eq!(walk(&tree, &[9]), (0, 1, false, Some(1)));
        assert_eq!(walk(&tree, &[]), (0, 1, false, Some(1)));
    }

    #[test]
    fn a_node_without_use_is_forgotten_and_runs_grow_together_again() {
        let mut tree = Tree::default();
        let long = tree.insert(&[1, 2, 3, 4]);
        *tree.load_mut(long) = Some(1);
        let short = tree.insert(&[1, 2]);
        *tree.load_mut(short) = Some(2);
        let other = tree.insert(&[1, 2, 7]);
        *tree.load_mut(other) = Some(3);
        *tree.load_mut(short) = None;
        tree.prune(short);
        // Two paths part there: it stays.
        assert_eq!(tree.walk(&[1, 2, 7]).path.len(), 3);
        *tree.load_mut(other) = None;
        tree.prune(other);
        assert_eq!(tree.faults(), Vec::<String>::new());
        assert_eq!(tree.walk(&[1, 2, 3, 4]).path, [ROOT, long]);
        *tree.load_mut(long) = None;
        tree.prune(long);
        assert_eq!((tree.faults(), tree.is_leaf(ROOT)), (Vec::new(), true));
    }

    /// Beside a plain list of sequences.
    #[test]
    fn random_sequences_are_found_as_in_a_list() {
        let mut state = 7_u64;
        let mut random = |n: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % n
        };
        let mut tree: Tree<u64> = Tree::default();
        let mut list: BTreeMap<Vec<TokenId>, u64> = BTreeMap::new();
        for step in 0..5000 {
            let len = 1 + random(8) as usize;
            let tokens: Vec<TokenId> = (0..len).map(|_| random(3) as TokenId).collect();
            if random(3) > 0 {
                let node = tree.insert(&tokens);
                *tree.load_mut(node) = Some(step);
                list.insert(tokens.clone(), step);
            } else if let Some(gone) = list.keys().nth(random(list.len().max(1) as u64) as usize) {
                let gone = gone.clone();
                list.remove(&gone);
                let node = tree.insert(&gone);
                *tree.load_mut(node) = None;
                tree.prune(node);
            }
            assert_eq!(tree.faults(), Vec::<String>::new());
            let walk = tree.walk(&tokens);
            let alike = |known: &Vec<TokenId>| {
                known
                    .iter()
                    .zip(&tokens)
                    .take_while(|(a, b)| a == b)
                    .count()
            };
            assert_eq!(walk.matched, list.keys().map(alike).max().unwrap_or(0));
            let found: Vec<u64> = walk
                .path
                .iter()
                .filter_map(|n| tree.load(*n))
                .copied()
                .collect();
            let expected: Vec<u64> = (1..=tokens.len())
                .filter_map(|n| list.get(&tokens[..n]).copied())
                .collect();
            assert_eq!(found, expected);
            assert_eq!(tree.loads().count(), list.len());
        }
    }
}
