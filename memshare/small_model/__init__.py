"""Small models without a hub: conversion, padded heads, the reasoner, folders that are whole."""
